"""The embedded checkpoint's recipe, whole: made-up stories -> token files -> 20 steps of a tiny shape -> a folder that the engine runs.

Trap: the loss also falls on a model that has only learned how often each token comes, so the bar lies below that entropy.
"""
import lzma
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cache import CacheConfig
from engine import Engine, SamplingParams
from model import Rope
from tokenizer import ChatTemplate, load_tokenizer
from weights import EMBEDDED, load_model
from weights.names import tensor_slots
from weights.storyteller import prepare as prepare_module
from weights.storyteller import train as recipe
from weights.storyteller.grow import grow
from weights.storyteller.prepare import ASSISTANT, HELD_OUT, SOURCES, USER, names_of, prepare, read_documents, renamed, request_for
from weights.storyteller.publish import export, samples

SHAPE = recipe.SHAPES["tiny"]
LEAKED = "a held out sentence that nobody may learn " * 5


def story(rng: random.Random) -> str:
    name, thing = rng.choice(("Lily", "Tom", "Mia", "Ben")), rng.choice(("ball", "kite", "stone", "bird", "cake"))
    place, feeling = rng.choice(("park", "garden", "forest")), rng.choice(("happy", "sad", "proud", "tired"))
    return (f"Once upon a time, there was a little child named {name}. {name} went to the {place} and found a {thing}.\n"
            f"{name} was very {feeling}. \"Look at my {thing}!\" said {name}. And {name} took the {thing} home and slept.")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work folder with prepared data and the report in it."""
    root, rng = tmp_path_factory.mktemp("recipe"), random.Random(0)
    (root / "texts").mkdir()
    for name in HELD_OUT:
        (root / "texts" / f"{name}.txt").write_text(f"{name} begins. {LEAKED}")
    for source in SOURCES[:3]:
        documents = [story(rng) for _ in range(300)]
        documents[7] += " " + LEAKED.upper().replace(" THAT", ", that -")       # case and punctuation do not hide a leak
        with lzma.open(root / f"{source}.txt.xz", "wt", encoding="utf-8") as file:
            file.write("\n<|endoftext|>\n<|endoftext|>\n".join(documents))
    prepare(root, root / "texts", root / "work" / "data", SHAPE.vocab_size)
    (root / "work" / "storybooks_ccby_ATTRIBUTION.txt").write_text("written by many")
    return root / "work"


@pytest.fixture(scope="module")
def trained(work: Path) -> torch.nn.Module:
    return recipe.train(work, SHAPE, steps=20, compile=False)


def test_documents_that_hold_held_out_text_are_removed_and_reported(work: Path) -> None:
    report = prepare(work, work, work / "data", SHAPE.vocab_size)
    assert [entry["source"] for entry in report["removed"]] == list(SOURCES[:3])
    assert all(set(entry["shared_runs"]) == set(HELD_OUT) for entry in report["removed"])
    assert report["sources"]["novels"]["documents"] == 299
    text = load_tokenizer_text(work, "novels")
    assert "nobody" not in text.lower() and "Once upon a time" in text


def load_tokenizer_text(work: Path, source: str) -> str:
    import sentencepiece
    sp = sentencepiece.SentencePieceProcessor(model_file=str(work / "data" / "tokenizer.model"))
    return sp.decode(np.load(work / "data" / f"{source}.npy").tolist())


def test_data_of_another_vocabulary_or_tokenizer_is_refused(work: Path) -> None:
    with pytest.raises(ValueError, match="vocabulary of 400, this shape has 401"):
        prepare(work, work, work / "data", 401)
    own = work / "data" / "tokenizer.model"
    assert prepare(work, work, work / "data", SHAPE.vocab_size, own)["vocab_size"] == SHAPE.vocab_size
    with pytest.raises(ValueError, match="made with another tokenizer"):
        prepare(work, work, work / "data", SHAPE.vocab_size, EMBEDDED / "tokenizer.model")


def test_a_blank_line_that_became_a_separator_joins_again_and_two_stories_do_not(tmp_path: Path) -> None:
    rest, long = "One day, he ran far away and came home late, and all were glad to see him. " * 2, "He ran and ran. " * 40
    book = "A Book With a Title\nIt rained for days and days, and nobody went out of the house at all, not even the cat or the dog."
    pieces = ["Once there was a dog.", rest, "Once there was a cat.\n\n" + long, "One day is a story of its own. " * 5, book, rest]
    with lzma.open(tmp_path / "x.xz", "wt") as file:
        file.write("\n<|endoftext|>\n".join(pieces) + "\n<|endoftext|>\n<|endoftext|>\n" + rest)
    expected = ["Once there was a dog.\n" + rest, "Once there was a cat.\n" + long, pieces[3], book, rest, rest]
    assert read_documents(tmp_path / "x.xz") == [text.strip() for text in expected]


def test_a_request_names_the_story_s_own_hero_and_place() -> None:
    text = "Once upon a time, there was a little fox named Rusty. He went to the forest. Rusty met Anna."
    asked = {request_for(text, random.Random(seed)) for seed in range(40)}
    assert len(asked) > 8 and all("Rusty" in a and "in the forest" in a.lower() and "Anna" not in a for a in asked)
    assert request_for("It rained. The sun came out.", random.Random(0)) is None


def test_renamed_heroes_stay_who_they_are() -> None:
    """Guards a girl who becomes a boy, two heroes with one name, half a story under the old name, a short name parted from its long one."""
    told = "a girl named Lily, a girl named Mia, a girl called Anna, a boy named Tom, a boy named Ben, a boy called Sam, a boy named Will"
    names = names_of([told, "He will come."])
    assert set(names["girl"]) == {"Lily", "Mia", "Anna"} and set(names["boy"]) == {"Tom", "Ben", "Sam"}
    found = {renamed("Lily saw Tom. \"Lily's kite!\" said Tom to Rex.", names, random.Random(seed)) for seed in range(40)}
    assert found == {f"{girl} saw {boy}. \"{girl}'s kite!\" said {boy} to Rex." for girl in ("Mia", "Anna") for boy in ("Ben", "Sam")}
    short = "Tom met Tommy and Lily."
    assert renamed(short, names, random.Random(0)) == short


def test_windows_deal_each_piece_once_an_epoch(work: Path) -> None:
    windows = prepare_module.Windows(work / "data")
    n = (len(windows.ids[0]) - 1) // 64 - 1
    first, second = ([windows.next(0, 64) for _ in range(n)] for _ in range(2))
    assert len({w.tobytes() for w in first}) == n and len(first[0]) == 65
    assert {w.tobytes() for w in first} != {w.tobytes() for w in second}


def test_a_long_run_reads_the_small_sources_less_and_ends_without_novels(work: Path) -> None:
    def shares(step: int, progress: float) -> np.ndarray:
        windows = prepare_module.Windows(work / "data")
        windows.ids[1] = np.tile(windows.ids[1], 20)
        recipe.deal(windows, step, progress, SHAPE._replace(batch_tokens=2**20), torch.device("cpu"))
        T = max(T for _, T in windows.drawn)
        return np.array([windows.drawn.get((i, T), 0) for i in range(4)]) / (2**20 // T)
    assert np.allclose(shares(0, 0.), recipe.CURRICULUM[0][1], atol=.05)
    short, long = shares(0, .999), shares(10**6, .999)
    assert short[0] < .01 and np.allclose(short, recipe.CURRICULUM[-1][1], atol=.1)
    assert long[0] < .01 and long[1] > .5 > .3 > short[1], "where all are too small, sizes decide"


def test_orthogonal_levels_the_singular_values_and_keeps_the_directions() -> None:
    x = torch.randn(3, 40, 24, generator=torch.Generator().manual_seed(0)) * 7
    for m in (x, x.mT):
        s = torch.linalg.svdvals(recipe.orthogonal(m))
        assert .6 < s.min() and s.max() < 1.3
        u, _, vt = torch.linalg.svd(m, full_matrices=False)
        assert torch.nn.functional.cosine_similarity(recipe.orthogonal(m).flatten(1), (u @ vt).flatten(1)).min() > .97


def test_twenty_steps_beat_the_token_frequencies(work: Path, trained: tuple) -> None:
    model, figures = trained
    ids = np.load(work / "data" / "simple_stories.npy")
    p = np.bincount(ids, minlength=SHAPE.vocab_size) / len(ids)
    entropy = -(p[p > 0] * np.log(p[p > 0])).sum()
    with torch.no_grad():
        loss = recipe.loss_of(model, Rope(model.config, 512), torch.from_numpy(ids[None, :513].astype(np.int64)))
    assert loss < entropy - .3, (loss, entropy)
    assert figures["steps"] == 20 and figures["tokens"] == 20 * 512
    assert (work / "log.csv").read_text().splitlines()[2].startswith("20,")


def test_the_minutes_of_a_run_are_those_of_training(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards a warm-up, or half a short run, spent on compiling: each new length takes 100 s here, a step one."""
    shutil.copytree(work / "data", tmp_path / "data")
    now, seen, loss_of = [0.], set(), recipe.loss_of

    def slow(model: torch.nn.Module, rope: Rope, ids: torch.Tensor) -> torch.Tensor:
        now[0] += 1 if ids.shape in seen else 100
        seen.add(ids.shape)
        return loss_of(model, rope, ids)
    monkeypatch.setattr(recipe, "loss_of", slow)
    monkeypatch.setattr(recipe.time, "monotonic", lambda: now[0])
    _, figures = recipe.train(tmp_path, SHAPE._replace(lengths=((0., 64), (.5, 128))), minutes=.5, compile=False)
    assert figures["steps"] == 32 and figures["minutes"] == .5


def test_a_resumed_run_ends_with_the_same_weights(work: Path, trained: tuple) -> None:
    recipe.train(work, SHAPE, steps=20, compile=False, stop_after=9)
    model, figures = recipe.train(work, SHAPE, steps=20, compile=False, resume=True)
    assert figures["steps"] == 20 and figures["epochs"] == trained[1]["epochs"]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), trained[0].parameters(), strict=True))


@pytest.mark.parametrize(("arguments", "message"), [
    ([], "give --minutes or --steps"), (["--steps", "20", "--resume"], "resume.pt is of the shape"),
    (["--evaluate", "nowhere"], "nowhere"), (["--steps", "20", "--data", "nowhere"], "ATTRIBUTION.txt")])
def test_a_mistake_is_one_line_and_status_2(work: Path, trained: tuple, arguments: list, message: str, monkeypatch: pytest.MonkeyPatch,
                                            capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setitem(recipe.SHAPES, "gpu", SHAPE._replace(dim=128))
    with pytest.raises(SystemExit) as caught:
        recipe.main(["--work", str(work), "--data", str(work), "--held-out", str(work), *arguments])
    assert caught.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]


def test_the_exported_folder_gives_the_trained_model_s_logits_and_text(work: Path, trained: tuple, tmp_path: Path) -> None:
    model, _ = trained
    export(model, recipe.hf_config(SHAPE), work / "data", tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert set(stored) == set(tensor_slots(model.config, ())) and all(t.dtype == torch.bfloat16 for t in stored.values())
    loaded = load_model(tmp_path, dtype=torch.float32)
    rounded = recipe.new_model(model.config, dropout=0)
    rounded.load_state_dict({name: p.bfloat16().float() for name, p in model.state_dict().items()})
    tokenizer = load_tokenizer(tmp_path)
    ids, rope = torch.tensor([tokenizer.encode("Once upon a time, there was a little child")]), Rope(model.config, 512)
    with torch.no_grad():
        logits = recipe.logits_of(rounded, rope, ids)
        assert torch.equal(recipe.logits_of(loaded, rope, ids), logits)
    engine = Engine(loaded, max_seq_len=64, cache=CacheConfig.parse("full"))
    new = [token for step in engine.generate([ids[0].tolist()], SamplingParams(max_new_tokens=4)) for _, token in step.tokens]
    assert new[0] == int(logits[0, -1].argmax()) and len(new) == 4
    assert samples(tmp_path, max_new_tokens=2).count("greedy") == 5


def test_a_grown_model_starts_as_the_small_one_and_trains_everywhere(work: Path, trained: tuple, tmp_path: Path) -> None:
    """Guards query heads at another kv head's place, and new parts from which no gradient ever moves them."""
    small, shape = trained[0], SHAPE._replace(layers=3, heads=4, mlp=160, vocab_size=402)
    export(small, recipe.hf_config(SHAPE), work / "data", tmp_path / "small")
    model = recipe.new_model(recipe.ModelConfig.from_dict(recipe.hf_config(shape)), dropout=0)
    ids, rope = torch.from_numpy(np.load(work / "data" / "simple_stories.npy")[None, :65].astype(np.int64)), Rope(model.config, 64)
    grow(model, tmp_path / "small")
    loaded = load_model(tmp_path / "small", dtype=torch.float32)
    with torch.no_grad():
        assert torch.allclose(recipe.logits_of(model, rope, ids)[..., :400], recipe.logits_of(loaded, rope, ids), atol=1e-5)
    recipe.loss_of(model, rope, ids).backward()
    new = model.layers[2].attention.wo.weight
    assert new.abs().max() == 0 < new.grad.abs().min() and model.layers[0].mlp.w2.weight.grad[:, 96:].abs().min() > 0
    with pytest.raises(ValueError, match="dim 64, this shape 128"):
        grow(recipe.new_model(recipe.ModelConfig.from_dict(recipe.hf_config(shape._replace(dim=128))), dropout=0), tmp_path / "small")
    with pytest.raises(ValueError, match="n_layer 2, this shape only 1"):
        grow(recipe.new_model(recipe.ModelConfig.from_dict(recipe.hf_config(shape._replace(layers=1))), dropout=0), tmp_path / "small")


def test_chat_tokens_join_a_vocabulary_at_its_end_and_once() -> None:
    """Guards a tokenizer that cuts text in another way than the weights know it."""
    import sentencepiece
    protobuf = pytest.importorskip("sentencepiece.sentencepiece_model_pb2", reason="protobuf is not installed")
    model = protobuf.ModelProto.FromString((EMBEDDED / "tokenizer.model").read_bytes())
    kept = [p for p in model.pieces if p.piece not in (USER, ASSISTANT)]
    del model.pieces[:]
    model.pieces.extend(kept)
    with_both = prepare_module.with_chat_tokens(model.SerializeToString())
    assert prepare_module.with_chat_tokens(with_both) == with_both
    before, after = (sentencepiece.SentencePieceProcessor(model_proto=x) for x in (model.SerializeToString(), with_both))
    n, text = before.vocab_size(), "Once upon a time, <|user|> said:\n\"Hello!\""
    assert [after.id_to_piece(i) for i in (n, n + 1)] == [USER, ASSISTANT] and after.is_control(n) and after.vocab_size() == n + 2
    assert after.encode(text) == before.encode(text) and after.decode(after.encode(text)) == text


def test_a_conversation_is_rendered_as_the_requests_were_trained_on(work: Path, trained: tuple, tmp_path: Path) -> None:
    export(trained[0], recipe.hf_config(SHAPE), work / "data", tmp_path)
    tokenizer, ids = load_tokenizer(tmp_path), np.load(work / "data" / "requests.npy").tolist()
    user, assistant = (tokenizer.special_tokens[t] for t in (USER, ASSISTANT))
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    start = next(i for i in range(len(ids)) if ids[i:i + 2] == [1, user])
    middle, end = ids.index(assistant, start), ids.index(2, start)
    request, reply = tokenizer.decode(ids[start + 2:middle]), ids[middle + 1:end]
    template, message = ChatTemplate.from_checkpoint(tmp_path, tokenizer), {"role": "user", "content": request}
    assert template.encode([message]) == ids[start:middle + 1]
    told = {"role": "assistant", "content": tokenizer.decode(reply)}
    again = template.turn([message, told, message], ids[start:middle + 1], reply)
    assert again == ids[start:end] + [2, *ids[start + 1:middle + 1]]
    assert template.encode([message, told, message]) == again


def test_transformers_reads_the_folder_s_template_and_tokenizer_as_we_do(work: Path, trained: tuple, tmp_path: Path) -> None:
    """A dummy prefix inside a template is where its releases and ours differ: the space in the template settles it."""
    transformers = pytest.importorskip("transformers")
    export(trained[0], recipe.hf_config(SHAPE), work / "data", tmp_path)
    messages = [{"role": "user", "content": "Tom, in the park"}, {"role": "assistant", "content": "Tom ran.\nHe slept."},
                {"role": "user", "content": "Mia"}]
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(messages, add_generation_prompt=True)
    assert ChatTemplate.from_checkpoint(tmp_path, load_tokenizer(tmp_path)).encode(messages) == list(theirs["input_ids"])


def test_the_package_imports_nothing_of_the_recipe() -> None:
    root = Path(recipe.__file__).parents[2]
    for file in [*root.glob("*.py"), *(f for d in ("cache", "engine", "model", "tokenizer", "weights") for f in (root / d).rglob("*.py"))]:
        assert file.parent.name == "storyteller" or "storyteller.train" not in file.read_text(encoding="utf-8"), file


def test_every_shape_is_a_llama_that_fits_the_embedded_file() -> None:
    for name in ("gpu", "cpu", "grown"):
        config = recipe.ModelConfig.from_dict(recipe.hf_config(recipe.SHAPES[name]))
        with torch.device("meta"):
            n = sum(p.numel() for p in recipe.Transformer(config).parameters())
        assert config.n_layer >= 16 and config.head_dim == 64 and config.n_kv_head < config.n_head
        assert config.max_position_embeddings == 2048
        assert 10e6 < n < 30e6 and 2 * n < 40e6, (name, n)
