"""How alike the K and V of different layers are, token by token: what merging across depth lives on.

Contract: windows of a text pass the model with full attention; for K before RoPE, K after RoPE (what a cache stores) and V, every pair of
layers is compared per kv head and per token (all heads as one vector), raw and with each channel's mean over the tokens removed.
Trap: a mean vector that all tokens share gives a high raw cosine and says nothing about a token; look at the centred one beside it.
"""
import argparse
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cache.base import attend_exact
from engine.measure.report import check_outputs, machine, new_figure, print_table, progress, save_figure, write_json
from engine.measure.windows import read_windows
from model import Rope, Transformer, apply_rope
from options import device_and_dtype, open_checkpoint
from weights import find_alignment, load_model
from weights.alignment import fold

KINDS = {"k_before_rope": "K before RoPE", "k": "K after RoPE", "v": "V"}
VIEWS = {"head": "per head", "head_centred": "per head, mean removed", "token": "per token", "token_centred": "per token, mean removed"}
ALIGNED = {"head_aligned": ("aligned: per head", ""), "lost_aligned": ("merge loses", ".1%")}
# The share of energy that codes of 2 and of 4 bits lose (Lloyd-Max, normal law). A pair merged at 4 bits takes the bytes of two layers at
# 2 bits, so merging pays only where it loses less than the difference.
LOST_2_BITS, LOST_4_BITS = .1175, .0095
LIMIT = LOST_2_BITS - LOST_4_BITS


def run(args: argparse.Namespace) -> int:
    """The subject `similarity` of bench.py -> exit status."""
    check_outputs(args.out, args.plot)
    (device, dtype), (checkpoint, config, tokenizer) = device_and_dtype(args), open_checkpoint(args.checkpoint)
    if not 2 <= args.context <= config.max_position_embeddings:
        raise ValueError(f"--context is {args.context}; give 2 to {config.max_position_embeddings}, the model's positions")
    if args.windows < 1:
        raise ValueError(f"--windows is {args.windows}; give at least 1")
    if config.n_layer < 2:
        raise ValueError(f"{checkpoint} has {config.n_layer} layer, nothing to compare; choose a deeper model")
    windows = read_windows(args.text, tokenizer, n_tokens=args.context, n_windows=args.windows)
    alignment = find_alignment(args.alignment, checkpoint, config)
    model = load_model(checkpoint, device=device, dtype=dtype)
    compared = compare_kinds(record(model, windows))
    if alignment:
        fold(model, alignment.layers)
        aligned = compare_kinds(record(model, windows, "aligned, "))
        compared |= {f"{kind}_aligned": x for kind, x in aligned.items() if kind != "k_before_rope"}

    settings = {"checkpoint": str(checkpoint), "text": args.text, "tokens": args.context * args.windows, "context_tokens": args.context,
                "windows": args.windows, "device": str(device), "dtype": str(model.embed.weight.dtype).removeprefix("torch.")}
    print(f"{Path(args.text).name}: {settings['tokens']:,} tokens in {args.windows} windows; {checkpoint.name}, {device}, "
          f"{settings['dtype']}\nCosine of one token's vectors at two layers: median over tokens (5th percentile); adjacent layers\n"
          "merge loses: share of a layer's energy that the best shared direction per head and token leaves out, mean of the two layers")
    columns = {"pair": ("layers", "")} | {view: (heading, "") for view, heading in VIEWS.items()} | {"lost": ("merge loses", ".1%")}
    together = {pair for group in (alignment.groups if alignment else ()) for pair in combinations(group, 2)}
    for kind, name in KINDS.items():
        print(f"\n{name}")
        rows, aligned = [], compared.get(f"{kind}_aligned")
        for i, j in sorted({(i, i + 1) for i in range(config.n_layer - 1)} | together):
            rows.append({"pair": f"{i}, {j}", "lost": compared[kind]["merge_loss"][i][j]})
            rows[-1] |= {view: cosine(compared[kind][view], i, j) for view in VIEWS}
            if aligned and (i, j) in together:
                rows[-1] |= {"head_aligned": cosine(aligned["head"], i, j), "lost_aligned": aligned["merge_loss"][i][j]}
        print_table(rows, columns | (ALIGNED if aligned else {}))
    if alignment:
        print(f"\naligned: in the coordinates of {alignment.source}, fitted to the loss at attention's output, not to these figures")
    merged = {kind: pairs_to_merge(compared[kind]["merge_loss"]) for kind in ("k", "v")}
    print(f"\nWhat to merge: a pair merged at 4 bits takes the bytes of 2-bit codes unmerged, so it may lose {LIMIT:.1%} of its energy.")
    for kind, pairs in merged.items():
        print(verdict(KINDS[kind], pairs, compared[kind]))
    write_json(args.out, {"subject": "similarity", "machine": machine(device), "settings": settings, "cosine_by_layer_pair": compared,
                          "pairs_to_merge": merged, "merge_loss_limit_share": LIMIT})
    if args.plot is not None:
        plot(compared, args.plot, title=f"{checkpoint.name} on {Path(args.text).name}")
    return 0


def cosine(figures: dict[str, list[list[float]]], i: int, j: int) -> str:
    return f"{figures['median'][i][j]:+.2f} ({figures['p5'][i][j]:+.2f})"


def name_of(kind: str) -> str:
    return KINDS.get(kind) or KINDS[kind.removesuffix("_aligned")] + ", aligned"


def compare_kinds(states: dict[str, Tensor]) -> dict[str, dict[str, Any]]:
    """`compare_layers` for each kind of state."""
    compared = {}
    for kind, x in states.items():
        progress(f"comparing {len(x)} layers: {KINDS[kind]}")
        compared[kind] = compare_layers(x)
    return compared


class RecordingLayer:
    """A layer cache that stores nothing: exact causal attention over its own chunk, Q, K and V kept for whoever asks."""

    def __init__(self, sliding_window: int | None) -> None:
        self.sliding_window = sliding_window

    def attend(self, q: Tensor, k: Tensor, v: Tensor, input_pos: Tensor, valid: Tensor, rows: Tensor | None = None) -> Tensor:
        self.q, self.k, self.v = q, k, v
        i = torch.arange(q.shape[2], device=q.device)
        window = self.sliding_window
        mask = None if window is None else ((i <= i[:, None]) & (i > i[:, None] - window))[None, None]
        return attend_exact(q, k, v, mask)


@torch.inference_mode()
def record(model: Transformer, windows: Sequence[Sequence[int]], notice: str = "") -> dict[str, Tensor]:
    """Windows of T ids -> by kind [L, tokens, G, D], in the model's dtype on the CPU."""
    device, T = model.embed.weight.device, len(windows[0])
    rope, kept = Rope(model.config, T).to(device), {kind: [] for kind in KINDS}
    for number, window in enumerate(windows, 1):
        progress(f"{notice}window {number} of {len(windows)}")
        caches = [RecordingLayer(model.config.sliding_window) for _ in model.layers]
        pos = torch.arange(T, device=device)[None]
        cos, sin = rope(pos)
        model.run_layers(model.embed(torch.tensor([window], device=device)), range(len(caches)), caches, (cos, sin), pos, pos >= 0)
        k, v = (torch.cat([getattr(c, x) for c in caches]) for x in "kv")                               # [L, G, T, D]
        for kind, x in (("k_before_rope", apply_rope(k, cos, -sin) / rope.scaling ** 2), ("k", k), ("v", v)):     # turned back by -angle
            kept[kind].append(x.transpose(1, 2).cpu())
    return {kind: torch.cat(x, 1) for kind, x in kept.items()}


def compare_layers(x: Tensor) -> dict[str, Any]:
    """x [L, tokens, G, D] -> for each of VIEWS the median and 5th percentile of the cosine, and merge_loss, all [L][L] lists (symmetric).

    merge_loss: the share of its energy that a layer loses, mean of the two, when each token and head keeps one shared direction
    (merge=optimal, coef=projection: with the Gram matrix's larger eigenvalue w and its vector (cos t, sin t), they keep w cos^2 t and
    w sin^2 t). Per layer, because a layer of small vectors would vanish in the sum of both, yet its attention needs them.
    """
    L, result = len(x), {}
    for view in VIEWS:
        vectors = x.float() if view.startswith("head") else x.flatten(2)[:, :, None].float()
        if view.endswith("centred"):
            vectors = vectors - vectors.mean(1, keepdim=True)
        norm = vectors.norm(dim=-1)
        figures = torch.zeros(3, L, L)
        for i in range(L):
            figures[:2, i, i] = 1
            for j in range(i + 1, L):
                dot = (vectors[i] * vectors[j]).sum(-1)
                cosine = (dot / (norm[i] * norm[j]).clamp_min(1e-20)).flatten().sort().values
                a, b = norm[i].square(), norm[j].square()
                kept, angle = (a + b) / 2 + (((a - b) / 2).square() + dot.square()).sqrt(), torch.atan2(2 * dot, a - b) / 2
                lost = 1 - ((kept * angle.cos().square()).sum() / a.sum() + (kept * angle.sin().square()).sum() / b.sum()) / 2
                figures[:, i, j] = figures[:, j, i] = torch.stack((cosine[len(cosine) // 2], cosine[len(cosine) // 20], lost))
        result[view] = {"median": figures[0].tolist(), "p5": figures[1].tolist()}
        if view == "head":
            result["merge_loss"] = figures[2].tolist()
    return result


def pairs_to_merge(merge_loss: Sequence[Sequence[float]]) -> list[tuple[int, int]]:
    """Disjoint pairs of adjacent layers under the limit, taken from the least loss upward."""
    taken: set[int] = set()
    pairs = []
    for lost, i in sorted((merge_loss[i][i + 1], i) for i in range(len(merge_loss) - 1)):
        if lost < LIMIT and not taken & {i, i + 1}:
            taken |= {i, i + 1}
            pairs.append((i, i + 1))
    return sorted(pairs)


def verdict(name: str, pairs: Sequence[tuple[int, int]], compared: dict[str, Any]) -> str:
    """The pairs and their figures, or the best of the adjacent ones and why it is not good enough."""
    loss = compared["merge_loss"]
    best = min((loss[i][i + 1], i) for i in range(len(loss) - 1))[1]
    figures = "; ".join(f"({i}, {j}) loses {loss[i][j]:.1%}, median cosine {compared['head']['median'][i][j]:+.2f} per head, "
                        f"{compared['head_centred']['median'][i][j]:+.2f} with the mean removed" for i, j in pairs or [(best, best + 1)])
    return f"{name}: {'merge' if pairs else 'none of the adjacent pairs; the best:'} {figures}"


def plot(compared: dict[str, Any], path: str, *, title: str) -> None:
    """Median cosine of every pair of layers: a row for each view, a column for each kind, aligned ones last."""
    figure, axes = new_figure(len(VIEWS), len(compared), width=4, height=3.6)
    figure.suptitle(f"Median cosine of one token's vectors at two layers: {title}")
    for row, (view, heading) in zip(axes, VIEWS.items(), strict=True):
        for ax, kind in zip(row, compared, strict=True):
            image = ax.imshow(compared[kind][view]["median"], vmin=-1, vmax=1, cmap="RdBu_r")
            ax.set(title=f"{name_of(kind)}, {heading}", xlabel="layer", ylabel="layer")
            ax.title.set_fontsize(9)
    figure.colorbar(image, ax=axes, shrink=.5, label="cosine")
    save_figure(figure, path)
