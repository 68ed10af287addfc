"""What a cache costs in accuracy, next to its bytes: each cache reads the same windows of a text and is held against the full cache.

Contract: `context` tokens are prefilled (exact attention, then stored), the next `continuation` tokens are fed one by one as in decoding,
and each of those steps is scored on the token that follows in the text. Losses are means over a window; intervals are over windows.
Scoring "chunk" feeds the continuation at once: two to three times faster, but no token of it is read compressed: a cache looks better.
A merged cache is measured without and with the alignment; prompts are computed once, by the model as it is, and turned for the aligned one.
Trap: the first token after the context is predicted by the exact prompt, whatever the cache; it is not scored.
"""
import argparse
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cache import CacheConfig, KVCache, bits_per_element
from cache.split import SplitGroup
from engine.compare import forced_logits, token_losses
from engine.engine import Engine
from engine.measure.report import check_outputs, machine, new_figure, print_table, progress, save_figure, write_json
from engine.measure.rivals import Rival, parse_cache
from engine.measure.windows import read_windows
from model import Transformer
from options import device_and_dtype, open_checkpoint
from weights import Alignment, aligned, find_alignment, load_model

DEFAULT_CACHES = ("quant,bits=8", "quant,bits=4", "quant,bits=3", "quant,bits=2", "minicache", "minicache,merge_k=0", "minicache,merge_v=0",
                  "minicache,bits=4", "minicache,bits=4,merge_k=0", "minicache,bits=4,merge_v=0", "minicache,bits=3",
                  "minicache,preset=paper", "rtn,bits=4", "kivi,bits=4", "kivi,bits=2", "kivi,bits=2,residual=32")
SCORING = {"decode": "one by one as in decoding", "chunk": "as one exact chunk over the stored context"}
COLUMNS = {
    "cache": ("cache", ""), "kv_bytes": ("KV bytes", ","), "bits_per_element": ("bits/element", ".2f"), "ratio_to_full": ("x bf16", ".2f"),
    "nll_nats_per_token": ("NLL", ".4f"), "nll_difference_nats_per_token": ("NLL - full", "+.4f"),
    "nll_difference_interval_nats": ("+- 95 %", ".4f"), "kl_nats_per_token": ("KL", ".5f"), "top1_agreement_share": ("same top-1", ".1%"),
    "retained_fill_share": ("retained", ".0%"), "overflow_tokens": ("overflow", ".1f"), "windows": ("windows", "")}


def run(args: argparse.Namespace) -> int:
    """The subject `quality` of bench.py -> exit status, 130 where Ctrl-C ended it early; what was measured until then is reported."""
    # 1. all that needs no weights
    check_outputs(args.out, args.plot)
    for option in ("context", "continuation", "windows", "batch_size"):
        if getattr(args, option) < 1:
            raise ValueError(f"--{option.replace('_', '-')} is {getattr(args, option)}; give at least 1")
    (device, dtype), (checkpoint, config, tokenizer) = device_and_dtype(args), open_checkpoint(args.checkpoint)
    capacity = args.context + args.continuation
    if capacity > config.max_position_embeddings:
        raise ValueError(f"--context {args.context} + --continuation {args.continuation} is {capacity} tokens, the model has "
                         f"{config.max_position_embeddings} positions; lower one of them")
    caches = {spec: parse_cache(spec) for spec in ("full", *(args.cache or DEFAULT_CACHES))}
    shape = dict(n_layer=config.n_layer, n_kv_head=config.n_kv_head, head_dim=config.head_dim, max_seq_len=capacity,
                 batch=min(args.batch_size, args.windows), dtype=dtype or config.dtype, sliding_window=config.sliding_window)
    results = []
    for spec, cache in caches.items():
        nbytes = cache.build(**shape, device="meta").nbytes()
        results.append(Result(spec, cache, nbytes, shape))
        if merges(cache) and (alignment := find_alignment(args.alignment, checkpoint, config, cache)):
            results.append(Result(spec, cache, nbytes, shape, alignment))
    windows = read_windows(args.text, tokenizer, n_tokens=capacity + 1, n_windows=args.windows)
    # 2. the work
    model, interrupted = load_model(checkpoint, device=device, dtype=dtype), False
    try:
        for spec, first in measure(model, windows, results, context=args.context, capacity=capacity, batch=shape["batch"],
                                   chunk=args.scoring == "chunk"):
            progress(f"windows {first + 1} to {min(first + shape['batch'], args.windows)} of {args.windows}: {spec}")
    except KeyboardInterrupt:
        interrupted = True
        progress("interrupted: the table holds what was measured until here")
    # 3. the report
    full = results[0]
    rows = sorted((r.as_json(full) for r in results if r.losses), key=lambda row: -row["kv_bytes"])
    settings = {"checkpoint": str(checkpoint), "text": args.text, "context_tokens": args.context, "continuation_tokens": args.continuation,
                "windows": args.windows, "rows": shape["batch"], "capacity_tokens": capacity, "device": str(device),
                "dtype": str(model.embed.weight.dtype).removeprefix("torch."), "scoring": args.scoring}
    dtype_name = settings["dtype"]
    print(f"{Path(args.text).name}: {args.windows} windows, {args.context} tokens stored + {args.continuation} fed "
          f"{SCORING[args.scoring]} and scored; {checkpoint.name}, {device}, {dtype_name}\n"
          f"KV bytes of {shape['batch']} rows x {capacity} tokens, everything counted, exact parts in {dtype_name}; "
          "x bf16: how many times smaller than a bf16 full cache\n"
          "NLL and KL in nats per token; retained: share of the slots in use; overflow: tokens beyond the threshold without a slot\n")
    print_table(rows, COLUMNS)
    write_json(args.out, {"subject": "quality", "machine": machine(device), "settings": settings, "rows": rows, "interrupted": interrupted})
    if args.plot is not None:
        plot(rows, args.plot, title=f"{checkpoint.name} on {Path(args.text).name}, {settings['dtype']}")
    return 130 if interrupted else 0


class Result:
    """One cache and what came of it so far. losses: [3, windows] for each batch, the rows of `token_losses`."""

    def __init__(self, spec: str, cache: CacheConfig | Rival, nbytes: dict[str, int], shape: dict[str, Any],
                 alignment: Alignment | None = None) -> None:
        self.spec, self.cache, self.nbytes, self.alignment = spec + (" (aligned)" if alignment else ""), cache, nbytes, alignment
        self.bits = bits_per_element(sum(nbytes.values()), **shape)
        self.losses: list[Tensor] = []
        self.retained: list[tuple[float, float]] = []

    def as_json(self, full: "Result") -> dict[str, Any]:
        """A row of the table. Differences are paired: window by window against `full`, which has read at least the same ones."""
        nll, kl, top1 = torch.cat(self.losses, 1)
        n = len(nll)
        difference = nll - torch.cat(full.losses, 1)[0, :n]
        simulated = isinstance(self.cache, Rival)
        fill, overflow = (sum(x) / len(x) for x in zip(*self.retained, strict=True)) if self.retained else (None, None)
        return {"cache": self.spec + " (simulated)" * simulated, "cache_settings": str(self.cache), "simulated": simulated,
                "alignment": self.alignment.source if self.alignment else None,
                "kv_bytes": sum(self.nbytes.values()), "kv_bytes_by_kind": self.nbytes, "bits_per_element": self.bits,
                "ratio_to_full": 16 / self.bits, "windows": n,
                "nll_nats_per_token": nll.mean().item(), "nll_difference_nats_per_token": difference.mean().item(),
                "nll_difference_interval_nats": 1.96 * difference.std().item() / n ** 0.5 if n > 1 else None,
                "kl_nats_per_token": kl.mean().item(), "top1_agreement_share": top1.mean().item(), "retained_fill_share": fill,
                "overflow_tokens": overflow, "nll_by_window": nll.tolist(), "kl_by_window": kl.tolist(), "top1_by_window": top1.tolist()}


def merges(cache: CacheConfig | Rival) -> bool:
    return isinstance(cache, CacheConfig) and cache.kind == "minicache"


@torch.inference_mode()
def measure(model: Transformer, windows: Sequence[Sequence[int]], results: Sequence[Result], *, context: int, capacity: int,
            batch: int, chunk: bool = False) -> Iterator[tuple[str, int]]:
    """Fill in `results`, the full cache first, which lends its prompts to the others; yields (spec, first window) before each run."""
    for first in range(0, len(windows), batch):
        rows = windows[first:first + batch]
        n, rows = len(rows), [*rows, *[rows[0]] * (batch - len(rows))]      # a last, smaller batch is filled up and cut again
        wanted = torch.tensor([w[context + 1:] for w in rows], device=model.embed.weight.device).T
        full: list[Tensor] = []
        exact: KVCache | None = None
        for result in results:
            yield result.spec, first
            with aligned(model, result.alignment, result.cache) as maps:
                engine = Engine(model, max_batch_size=batch, max_seq_len=capacity, cache=result.cache, compile=False)
                steps = forced_logits(engine, [w[:context] for w in rows], [w[context:] for w in rows], chunk=chunk, exact=exact, maps=maps)
                scored = (x.log_softmax(-1) for x in islice(steps, exact is None, None))
                if exact is None:
                    exact, full = engine.cache, (scored := list(scored))
                total = sum(token_losses(p, q, want) for p, q, want in zip(full, scored, wanted, strict=True))
            result.losses.append(total[:, :n].cpu() / len(full))
            if (use := retained_use(engine.cache, n)) is not None:
                result.retained.append(use)


def retained_use(cache: KVCache, n: int) -> tuple[float, float] | None:
    """Of the first n rows: the share of slots for retained tokens that count now, and tokens beyond the threshold without a slot
    (mean per row, kv head and group of layers). None where nothing is merged or retained."""
    groups = [g for g in cache.groups if isinstance(g, SplitGroup) and len(g.layers) > 1 and g.R]
    if not groups:
        return None
    fill, overflow = ([x[:n].float().mean().item() for x in each] for each in ([g.active() for g in groups], [g.overflow for g in groups]))
    return sum(fill) / len(fill), sum(overflow) / len(overflow)


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """(bits, loss) points -> indices of those that no other point beats or equals in both, by rising bits."""
    front: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: points[i]):
        if not front or points[i][1] < points[front[-1]][1]:
            front.append(i)
    return front


def plot(rows: Sequence[dict[str, Any]], path: str, *, title: str) -> None:
    """Both losses over bits per element, one number for each cache, the Pareto front as a line."""
    rows = [row for row in rows if row["cache"] != "full"]
    figure, (axes,) = new_figure(1, 2, width=7.5, height=5 + len(rows) / 15)
    figure.suptitle(f"What a cache costs, at its size: {title}")
    kinds = [row["cache_settings"].partition(",")[0] + bool(row["alignment"]) * ", aligned" for row in rows]
    colours = {kind: f"C{i}" for i, kind in enumerate(dict.fromkeys(kinds))}
    for ax, key, label in ((axes[0], "nll_difference_nats_per_token", "NLL above the full cache, nats (bars: 95 %)"),
                           (axes[1], "kl_nats_per_token", "KL from the full cache, nats")):
        points = [(row["bits_per_element"], row[key]) for row in rows]
        front = [points[i] for i in pareto_front(points)]
        ax.plot(*zip(*front, strict=True), color="0.7", linewidth=4, zorder=0, label="Pareto front: no other is smaller and better")
        for number, (row, kind, (bits, loss)) in enumerate(zip(rows, kinds, points, strict=True), 1):
            colour = colours[kind]
            bar = row["nll_difference_interval_nats"] if key.startswith("nll") else None
            ax.errorbar(bits, loss, yerr=bar, fmt="o", color=colour, capsize=2, mfc="white" if row["simulated"] else colour,
                        label=f"{number}  {row['cache']}")
            ax.annotate(str(number), (bits, loss), xytext=(6, 5), textcoords="offset points")
        ax.set(xlabel="bits per element, everything counted", ylabel=label)
        ax.grid(alpha=.3)
    axes[0].set_yscale("symlog", linthresh=1e-3)
    if all(row["kl_nats_per_token"] > 0 for row in rows):
        axes[1].set_yscale("log")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    save_figure(figure, path)
