"""Does a cache still find one sentence in a long text: a needle ("The name of the dog was Pibble.") at growing depth, then its cue.

Contract: the text with the needle is prefilled (exact attention, then stored); the cue and the answer are fed one by one over what is
stored. Found: greedy decoding says the answer, that is, each of its tokens is the likeliest after the ones before. Answer NLL: nats per
token of the answer; the same cue after the same text without the needle says how much of it the model could have guessed.
Trap: a cue inside the prompt would be answered by exact attention, whatever the cache stores.
"""
import argparse
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cache import CacheConfig
from engine.compare import forced_logits
from engine.engine import Engine
from engine.measure.quality import merges
from engine.measure.report import check_outputs, machine, new_figure, print_table, progress, save_figure, write_json
from engine.measure.rivals import Rival, parse_cache
from engine.measure.windows import read_windows
from model import Transformer
from options import device_and_dtype, open_checkpoint
from tokenizer import Tokenizer
from weights import Alignment, aligned, find_alignment, load_model

DEFAULT_CACHES = ("quant,bits=4", "quant,bits=2", "minicache,merge_k=0", "minicache", "minicache,bits=4", "minicache,preset=paper")
CUES = ("The name of the dog was", "The name of the king was", "The name of the boat was", "The secret word was",
        "The old woman was called", "The name of the town was", "The name of the horse was", "The little rabbit was called")
ANSWERS = ("Pibble", "Rosie", "Tommo", "Bluebell", "Marlow", "Daisy", "Whisker", "Sunny", "Oliver", "Peppin", "Juniper", "Toby")
COLUMNS = {
    "cache": ("cache", ""), "bits_per_element": ("bits/element", ".2f"), "length_tokens": ("length", ""), "found_share": ("found", ".1%"),
    "nll_nats_per_token": ("answer NLL", ".3f"), "nll_without_nats_per_token": ("without needle", ".3f"),
    "gain_nats_per_token": ("gain", "+.3f"), "nll_difference_nats_per_token": ("NLL - full", "+.4f"),
    "nll_difference_interval_nats": ("+- 95 %", ".4f")}
ENDS = tuple(x.encode() for x in (".", "!", "?", '"', "'", "\u201d", "\u2019"))


@dataclass(frozen=True)
class Case:
    """One row: a text as it is stored, what is fed after it, and how many of the last ids are the answer. depth -1: no needle."""

    text: list[int]
    fed: list[int]
    n_answer: int
    needle: int
    depth: int


def run(args: argparse.Namespace) -> int:
    """The subject `needle` of bench.py -> exit status, 130 where Ctrl-C ended it early; what was measured until then is reported."""
    # 1. all that needs no weights
    check_outputs(args.out, args.plot)
    for option, least in (("depths", 2), ("needles", 1), ("batch_size", 1)):
        if getattr(args, option) < least:
            raise ValueError(f"--{option.replace('_', '-')} is {getattr(args, option)}; give at least {least}")
    if not all(x.strip().isdecimal() and int(x) >= 64 for x in args.lengths.split(",")):
        raise ValueError(f"--lengths {args.lengths} is not a list of whole numbers from 64 on; write for example 128,256,448")
    lengths = sorted({int(x) for x in args.lengths.split(",")})
    (device, dtype), (checkpoint, config, tokenizer) = device_and_dtype(args), open_checkpoint(args.checkpoint)
    caches = {spec: parse_cache(spec) for spec in dict.fromkeys(("full", *(args.cache or DEFAULT_CACHES)))}
    longest = max(len(cue) + len(answer) for cue, answer in needle_ids(tokenizer, args.needles, args.seed))
    if lengths[-1] + longest > config.max_position_embeddings:
        raise ValueError(f"--lengths {lengths[-1]} and the cue take {lengths[-1] + longest} tokens, the model has "
                         f"{config.max_position_embeddings} positions; ask for at most {config.max_position_embeddings - longest}")
    cases = {n: make_cases(args.text, tokenizer, length=n, depths=args.depths, needles=args.needles, seed=args.seed) for n in lengths}
    batch = min(args.batch_size, len(cases[lengths[0]]))
    shape = dict(n_layer=config.n_layer, n_kv_head=config.n_kv_head, head_dim=config.head_dim, dtype=dtype or config.dtype)
    alignments = {spec: find_alignment(args.alignment, checkpoint, config, cache) for spec, cache in caches.items() if merges(cache)}
    for cache in caches.values():       # a layout that cannot be is refused here
        cache.build(**shape, batch=1, max_seq_len=lengths[0] + longest, device="meta")
    # 2. the work
    model, interrupted, rows = load_model(checkpoint, device=device, dtype=dtype), False, []
    try:
        for length in lengths:
            measured = measure(model, cases[length], caches, alignments, capacity=length + longest, batch=batch, depths=args.depths)
            rows += [{"length_tokens": length} | row for row in measured]
    except KeyboardInterrupt:
        interrupted = True
        progress("interrupted: the table holds what was measured until here")
    # 3. the report
    rows = [row for i in range(len(caches)) for row in rows[i::len(caches)]]       # by cache, then by length
    settings = {"checkpoint": str(checkpoint), "text": args.text, "alignments": {spec: a.source for spec, a in alignments.items() if a},
                "lengths_tokens": lengths, "depths": args.depths, "needles": args.needles,
                "seed": args.seed, "rows": batch, "device": str(device), "scoring": "cue and answer one by one as in decoding",
                "dtype": str(model.embed.weight.dtype).removeprefix("torch."), "needle_texts": needle_texts(args.needles, args.seed)}
    cue, answer = settings["needle_texts"][0]
    print(f"{Path(args.text).name}: {args.needles} needles like \"{cue} {answer}.\" at {args.depths} depths, then \"{cue}\"; "
          f"{checkpoint.name}, {device}, {settings['dtype']}\n"
          "found: greedy decoding says the answer; NLL of the answer in nats per token; without needle: the same cue after the same text\n"
          "that lacks it; gain: without - with, what the model took from the needle; interval over needles\n")
    print_table(rows, COLUMNS)
    print("\naligned: " + (", ".join(settings["alignments"]) or "none"))
    full = [row for row in rows if row["cache"] == "full"]
    if weak := ", ".join(f"{row['found_share']:.0%} at {row['length_tokens']}" for row in full if row["found_share"] < .5):
        print(f"The full cache itself finds only {weak} tokens: there the model fails, not a cache, and the answer's NLL is what counts.")
    write_json(args.out, {"subject": "needle", "machine": machine(device), "settings": settings, "rows": rows, "interrupted": interrupted})
    if args.plot is not None and rows:
        plot(rows, args.plot, title=f"{checkpoint.name} on {Path(args.text).name}, {settings['dtype']}")
    return 130 if interrupted else 0


def needle_texts(n: int, seed: int) -> list[tuple[str, str]]:
    """n pairs of a cue and an answer, the same for the same seed; cues repeat after len(CUES)."""
    draw = random.Random(seed)
    return [(CUES[i % len(CUES)], draw.choice(ANSWERS)) for i in range(n)]


def needle_ids(tokenizer: Tokenizer, n: int, seed: int) -> list[tuple[list[int], list[int]]]:
    """The same as ids, each as it goes on after a text."""
    return [tuple(tokenizer.encode_with_special(f" {x}", continues=True) for x in pair) for pair in needle_texts(n, seed)]


def make_cases(path: str, tokenizer: Tokenizer, *, length: int, depths: int, needles: int, seed: int) -> list[Case]:
    """Texts of `length` ids that end with a sentence; each needle stands after the sentence nearest to depth / (depths - 1) of its text.

    Every needle has a window of the file of its own, the same at all depths; the one without it has as many ids of the file more.
    """
    n_bos, cases, slack = len(tokenizer.encode("")), [], 64         # slack: tokens within which a sentence should end
    stop = tokenizer.encode_with_special(".", continues=True)
    windows = read_windows(path, tokenizer, n_tokens=length + slack, n_windows=needles, option="--needles")
    for i, ((cue, answer), window) in enumerate(zip(needle_ids(tokenizer, needles, seed), windows, strict=True)):
        bos, words = window[:n_bos], window[n_bos:]
        ends = sentence_ends(words, tokenizer)
        end = max((e for e in ends if e >= length - n_bos), default=len(words))
        fed, sentence = cue + answer, cue + answer + stop
        cases.append(Case(bos + words[end - length + n_bos:end], fed, len(answer), i, -1))
        first = end - (length - n_bos - len(sentence))
        places = [e for e in ends if first < e < end] + [first, end]
        for depth in range(depths):
            at = min(places, key=lambda e: abs(e - first - (end - first) * depth / (depths - 1)))
            cases.append(Case(bos + words[first:at] + sentence + words[at:end], fed, len(answer), i, depth))
    return cases


def sentence_ends(ids: Sequence[int], tokenizer: Tokenizer) -> list[int]:
    """Where a sentence has just ended: after its mark, before a space or a new line."""
    text = [tokenizer.token_bytes(id) for id in ids]
    return [i + 1 for i in range(len(ids) - 1) if text[i].endswith(ENDS) and text[i + 1][:1].isspace()]


@torch.inference_mode()
def measure(model: Transformer, cases: Sequence[Case], caches: dict[str, CacheConfig | Rival], alignments: dict[str, Alignment | None], *,
            capacity: int, batch: int, depths: int) -> list[dict[str, Any]]:
    """A row of the table for each cache, `full` first, which lends its prompts to the others."""
    shape = 2, 1 + max(case.needle for case in cases), depths + 1       # NLL, found; the last column: without the needle
    figures = {spec: torch.full(shape, float("nan"), dtype=torch.float64) for spec in caches}
    bits: dict[str, float] = {}
    for start in range(0, len(cases), batch):
        some, exact = cases[start:start + batch], None
        some += [some[0]] * (batch - len(some))         # filled up: every batch has the bytes of a whole one
        for spec, cache in caches.items():
            progress(f"texts {start + 1} to {min(start + batch, len(cases))} of {len(cases)}, {len(some[0].text)} tokens: {spec}")
            with aligned(model, alignments.get(spec), cache) as maps:
                engine = Engine(model, max_batch_size=batch, max_seq_len=capacity, cache=cache, compile=False)
                steps = forced_logits(engine, [c.text for c in some], [c.fed for c in some], exact=exact, maps=maps)
                scored = torch.stack([x.log_softmax(-1).cpu() for x in islice(steps, exact is None, None)])     # from the cue on
            exact, bits[spec] = exact or engine.cache, engine.bits_per_element
            for row, case in enumerate(some):
                p, want = scored[:len(case.fed) - 1][-case.n_answer:, row], torch.tensor(case.fed[-case.n_answer:])
                loss = -p.gather(1, want[:, None]).double().mean()
                figures[spec][:, case.needle, case.depth] = torch.stack((loss, (p.argmax(-1) == want).all().double()))
    return [as_json(spec, caches[spec], figures[spec], figures["full"], bits[spec]) for spec in caches]


def as_json(spec: str, cache: CacheConfig | Rival, figures: Tensor, full: Tensor, bits: float) -> dict[str, Any]:
    """A row of the table from figures [2, needles, depths + 1]. Differences are paired, needle by needle against `full`."""
    (nll, found), without, simulated = figures[:, :, :-1], figures[0, :, -1], isinstance(cache, Rival)
    difference, n = (nll - full[0, :, :-1]).mean(1), len(nll)
    return {"cache": spec + " (simulated)" * simulated, "cache_settings": str(cache), "simulated": simulated, "bits_per_element": bits,
            "found_share": found.mean().item(), "nll_nats_per_token": nll.mean().item(),
            "nll_without_nats_per_token": without.mean().item(),
            "gain_nats_per_token": (without.mean() - nll.mean()).item(), "nll_difference_nats_per_token": difference.mean().item(),
            "nll_difference_interval_nats": 1.96 * difference.std().item() / n ** .5 if n > 1 else None,
            "found_share_by_depth": found.mean(0).tolist(), "nll_nats_per_token_by_depth": nll.mean(0).tolist(),
            "nll_by_needle_and_depth": nll.tolist(), "nll_without_by_needle": without.tolist()}


def plot(rows: Sequence[dict[str, Any]], path: str, *, title: str) -> None:
    """The answer's NLL over depth, a panel a cache, a line a length; dotted: without the needle."""
    names = list(dict.fromkeys(row["cache"] for row in rows))
    n_columns = min(len(names), 4)
    figure, grid = new_figure(-(-len(names) // n_columns), n_columns, width=3.6, height=3.4)
    figure.suptitle(f"The answer's NLL by the needle's depth (dotted: without the needle)\n{title}")
    panels = [ax for row in grid for ax in row]
    for ax in panels[len(names):]:
        ax.set_visible(False)
    top = 1.05 * max(max(row["nll_without_nats_per_token"], *row["nll_nats_per_token_by_depth"]) for row in rows)
    for ax, name in zip(panels, names, strict=False):
        for i, row in enumerate(row for row in rows if row["cache"] == name):
            curve = row["nll_nats_per_token_by_depth"]
            depth = [100 * d / (len(curve) - 1) for d in range(len(curve))]
            ax.plot(depth, curve, color=f"C{i}", marker=".", label=f"{row['length_tokens']} tokens, found {row['found_share']:.0%}")
            ax.axhline(row["nll_without_nats_per_token"], color=f"C{i}", linestyle=":")
        title = f"{name} ({row['bits_per_element']:.1f} bits at {row['length_tokens']})"
        ax.set(title=title, xlabel="depth, % of the text", ylabel="nats per token", ylim=(0, top))
        ax.title.set_fontsize(9)
        ax.legend(fontsize=7)
        ax.grid(alpha=.3)
    save_figure(figure, path)
