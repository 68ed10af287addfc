"""Raw text -> what the recipe trains on: documents without held-out text, a tokenizer, one file of token ids per source.

Contract: `prepare` fills a folder once (report.json says what it found); `Windows` deals sequences from it, the same ones for the same
draws. Trap: a word-for-word overlap with a held-out text removes the whole document, a novel that quotes at length as well.
"""
import json
import lzma
import random
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

SOURCES = ("novels", "children_classics", "simple_stories", "requests")
HELD_OUT = ("tinystories_valid", "alice", "time_machine", "northanger_abbey", "wikitext2_test")
OVERLAP = 30            # a training document that shares so many words in a row with a held-out text is removed
STORIES, COPIES = SOURCES[2:], 4        # each simple story so many times, all but the first with other names
USER, ASSISTANT = "<|user|>", "<|assistant|>"
PLACES = ("park", "forest", "garden", "beach", "castle", "school", "zoo", "house", "sea", "town", "village", "farm", "kitchen", "woods",
          "lake", "river", "store", "mountain", "jungle", "playground", "yard", "field", "city", "ocean", "cave", "desert", "barn", "shop")
REQUESTS = ("Tell me a story about {hero} {place}.", "A story about {hero} {place}, please.",
            "Can you tell me a story about {hero} {place}?", "{hero}, {place}",
            "Write a story: {hero} {place}.", "The hero is {hero}. It happens {place}.")


def read_documents(path: Path) -> list[str]:
    """Documents of an .xz file, parted by <|endoftext|> lines, blank lines dropped as in the held-out texts.

    In simple_stories a blank line inside a story became a separator, too (two in a row always end one): a piece goes on with the story
    before it where that is too short to be one, unless one of them has a title (first line without a full stop) or opens with "Once".
    """
    documents: list[str] = []
    for group in re.split(r"(?:<\|endoftext\|>\n){2,}", lzma.open(path, "rt", encoding="utf-8").read()):
        open_story = False
        for piece in group.split("<|endoftext|>"):
            piece = re.sub(r"\n\s*\n", "\n", piece).strip()
            titled = "\n" in piece and piece.partition("\n")[0][-1:] not in '.!?"' and len(piece.partition("\n")[0]) < 80
            if open_story and len(documents[-1]) < 400 and not titled and not piece.startswith("Once"):
                documents[-1] += "\n" + piece
            elif piece:
                documents.append(piece)
                open_story = not titled
    return [d for d in documents if len(d) >= 100]


def word_runs(text: str) -> np.ndarray:
    """A hash of each OVERLAP consecutive words [N] uint64, case and punctuation aside."""
    ids = np.array([zlib.crc32(w.encode()) for w in re.findall(r"[a-z0-9']+", text.lower())], np.uint64)
    n = len(ids) - OVERLAP + 1
    runs = np.zeros(max(n, 0), np.uint64)
    for j in range(OVERLAP if n > 0 else 0):
        runs = runs * np.uint64(0x9E3779B97F4A7C15) + ids[j:j + n]
    return runs


def request_for(story: str, rng: random.Random) -> str | None:
    """What a user might have asked to get this story, by rule: hero ("named ...", "there was a ...", the commonest name) and place."""
    opening = story[:600]
    if found := re.search(r"\b(an?) ((?:[a-z]+ ){1,4})named ([A-Z][a-z]+)", opening):
        hero = rng.choice((f"{found[1]} {found[2]}named {found[3]}", found[3]))
    elif found := re.search(r"\bthere (?:was|lived) (an? [a-z]+(?: [a-z]+){0,2}?)(?= (?:who|that|in|with|and)\b|[.,])", opening):
        hero = found[1]
    else:
        names = Counter(w for w in re.findall(r"[a-z] ([A-Z][a-z]{2,})\b", story) if w not in ("Mom", "Mommy", "Dad", "Daddy", "Mama"))
        if not names or names.most_common(1)[0][1] < 2:
            return None
        hero = names.most_common(1)[0][0]
    place = re.search(rf"\b(in|at|on|to|near|by) (the|an?|h[ei][rs]|their) ((?:[a-z]+ )?(?:{'|'.join(PLACES)}))\b", opening)
    where = f"{'in' if place[1] == 'to' else place[1]} the {place[3]}" if place else ""
    text = re.sub(r" (?=[.,?]|$)|, $", "", rng.choice(REQUESTS if place else REQUESTS[:3]).format(hero=hero, place=where))
    return text[0].upper() + text[1:] if rng.random() < .7 else text


def names_of(stories: list[str]) -> dict[str, Counter[str]]:
    """Names that stories give to girls and to boys, and how often; without those that are words more often (Rose)."""
    text = "\n".join(stories)
    words = Counter(re.findall(r"\b[a-z]+\b", text))
    girls, boys = (Counter(re.findall(rf"\b{kind} (?:named|called) ([A-Z][a-z]+)\b", text)) for kind in ("girl", "boy"))
    return {kind: Counter({name: n for name, n in mine.items() if n > max(others[name], words[name.lower()])})
            for kind, mine, others in (("girl", girls, boys), ("boy", boys, girls))}


def renamed(story: str, names: dict[str, Counter[str]], rng: random.Random) -> str:
    """The story with other names for its girls and boys: who is meant has to be read, and cannot be known by heart.

    As it is where one name may be short for another (Tim, Timmy)."""
    present, other = set(re.findall(r"\b[A-Z][a-z]+\b", story)), {}
    for kind in names.values():
        for name in sorted(present & kind.keys()):
            if any(n != name and n.startswith(name[:3]) for n in present):
                return story
            pool = [n for n in kind if n not in present and n not in other.values()]
            if pool:
                other[name] = rng.choices(pool, [kind[n] ** .5 for n in pool])[0]
    return re.sub(r"\b[A-Z][a-z]+\b", lambda word: other.get(word[0], word[0]), story)


def train_tokenizer(texts: dict[str, list[str]], vocab_size: int) -> bytes:
    """A byte-pair sentencepiece model in Llama's conventions: <unk> 0, <s> 1, </s> 2, byte fallback, no normalisation."""
    def lines() -> Iterator[str]:
        for documents in texts.values():        # about 8 MB of each source: the vocabulary is for children's books
            step = max(1, sum(map(len, documents)) // 8_000_000)
            yield from [line for document in documents for line in document.split("\n")][::step]
    file = BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines(), model_writer=file, model_type="bpe", vocab_size=vocab_size, byte_fallback=True, split_digits=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, allow_whitespace_only_pieces=True, character_coverage=.9995,
        control_symbols=[USER, ASSISTANT], max_sentence_length=16384, num_threads=2, minloglevel=2)
    return file.getvalue()


def with_chat_tokens(file: bytes) -> bytes:
    """A sentencepiece model with USER and ASSISTANT as its last two pieces, if it lacks them."""
    from sentencepiece import sentencepiece_model_pb2 as protobuf  # needs the package protobuf
    model = protobuf.ModelProto.FromString(file)
    known = {p.piece for p in model.pieces}
    for piece in (USER, ASSISTANT):
        if piece not in known:
            model.pieces.add(piece=piece, score=0., type=protobuf.ModelProto.SentencePiece.CONTROL)
    model.trainer_spec.vocab_size = len(model.pieces)
    return model.SerializeToString()


def prepare(data: Path, held_out: Path, target: Path, vocab_size: int, tokenizer: Path | None = None) -> dict[str, Any]:
    """target: <source>.npy (uint16, each document <s> ... </s>), tokenizer.model, report.json. Made once -> the report.

    tokenizer: take this sentencepiece model, two chat tokens added, instead of training one."""
    if (target / "report.json").is_file():
        report = json.loads((target / "report.json").read_text())
        if report["vocab_size"] != vocab_size:
            raise ValueError(f"{target} was made for a vocabulary of {report['vocab_size']}, this shape has {vocab_size}; "
                             "choose another --work")
        if tokenizer is not None and with_chat_tokens(tokenizer.read_bytes()) != (target / "tokenizer.model").read_bytes():
            raise ValueError(f"{target} was made with another tokenizer than {tokenizer}; choose another --work")
        return report
    target.mkdir(parents=True, exist_ok=True)
    held = {name: np.unique(word_runs((held_out / f"{name}.txt").read_text(encoding="utf-8"))) for name in HELD_OUT}
    report, texts = {"vocab_size": vocab_size, "overlap_words": OVERLAP, "removed": [], "sources": {}}, {}
    for source in SOURCES[:3]:
        texts[source] = []
        for document in read_documents(data / f"{source}.txt.xz"):
            runs = word_runs(document)
            shared = {name: n for name, h in held.items() if (n := int((h[np.searchsorted(h, runs) % len(h)] == runs).sum()))}
            if shared:
                report["removed"].append({"source": source, "opening": document[:60], "runs": len(runs), "shared_runs": shared})
            else:
                texts[source].append(document)
        print(f"{source}: {len(texts[source]):,} documents, {sum(map(len, texts[source])):,} characters", flush=True)
    model = train_tokenizer(texts, vocab_size) if tokenizer is None else with_chat_tokens(tokenizer.read_bytes())
    (target / "tokenizer.model").write_bytes(model)
    sp, rng = sentencepiece.SentencePieceProcessor(model_file=str(target / "tokenizer.model")), random.Random(0)
    bos, eos, user, assistant = sp.bos_id(), sp.eos_id(), sp.piece_to_id(USER), sp.piece_to_id(ASSISTANT)
    names = names_of(texts["simple_stories"])
    texts["simple_stories"] += [renamed(story, names, rng) for _ in range(COPIES - 1) for story in texts["simple_stories"]]
    encoded: dict[str, list[list[int]]] = {s: [[bos, *ids, eos] for ids in sp.encode(texts[s], num_threads=2)] for s in texts}
    asked = [(request, story) for story in texts["simple_stories"] if (request := request_for(story, rng))]
    encoded["requests"] = [[*([bos] if rng.random() < .75 else []), user, *sp.encode(request), assistant, *sp.encode(story), eos]
                           for request, story in asked]        # one in four goes on as the next turn of the conversation before it
    for source in SOURCES:
        if source in STORIES:
            random.Random(1).shuffle(encoded[source])
        ids = np.fromiter((i for document in encoded[source] for i in document), np.uint16)
        np.save(target / f"{source}.npy", ids)
        report["sources"][source] = {"documents": len(encoded[source]), "tokens": len(ids)}
    (target / "report.json").write_text(json.dumps(report, indent=1))
    return report


class Windows:
    """Sequences of T + 1 ids: each epoch cuts every source at another phase and deals the pieces in another order; `drawn` is the state."""

    def __init__(self, data: Path) -> None:
        self.ids = [np.load(data / f"{source}.npy", mmap_mode="r") for source in SOURCES]
        self.copies = [COPIES if source in STORIES else 1 for source in SOURCES]
        self.drawn: dict[tuple[int, int], int] = {}         # (source, T) -> windows
        self.order: dict[tuple[int, int], tuple[int, int, np.ndarray]] = {}

    def next(self, source: int, T: int) -> np.ndarray:
        ids = self.ids[source]
        n, drawn = (len(ids) - 1) // T - 1, self.drawn.get((source, T), 0)
        if n < 1:
            raise ValueError(f"{SOURCES[source]} has {len(ids):,} tokens, a sequence has {T}; give more text")
        epoch = drawn // n
        if self.order.get((source, T), (None,))[0] != epoch:
            rng = np.random.default_rng((source, T, epoch))
            self.order[source, T] = (epoch, int(rng.integers(T)), rng.permutation(n))
        _, phase, order = self.order[source, T]
        self.drawn[source, T] = drawn + 1
        start = phase + int(order[drawn % n]) * T
        return np.asarray(ids[start:start + T + 1], np.int64)
