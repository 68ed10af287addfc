"""Calibration of an alignment (weights/alignment.py): coordinates in which the layers that a cache merges lose least, fitted to a text.

Contract: the text passes the model layer by layer and a group is fitted when its last layer is done, so what is alive beside the weights
are hidden states, the Q, K and V of the groups that are open (of all merged layers for --pairs any), and copies of them while one is
fitted. What is made small is the loss at the output (merge_loss.py). Fitted on three quarters of the windows; the others choose between
head orders and maps, and where nothing wins there the checkpoint's own coordinates stay.
Trap: K and V are fitted apart, but a head's order is one for both, and its query heads move with it.
"""
import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import torch
from torch import Tensor

from cache import CacheConfig
from engine.measure.merge_loss import Group, States, stretch
from engine.measure.report import check_outputs, print_table, progress
from engine.measure.similarity import RecordingLayer
from engine.measure.windows import read_windows
from model import Rope, Transformer
from options import device_and_dtype, open_checkpoint, settle_cpu
from weights import load_model
from weights.alignment import Alignment, LayerMap, aligned, as_complex, write_alignment

COLUMNS = {"group": ("layers", ""), "order": ("kv heads", "")}
COLUMNS |= {f"{x}_{key}": (heading, spec) for x in "kv" for key, heading, spec in (
    ("before", f"{x.upper()} loss", ".4f"), ("after", "aligned", ".4f"), ("condition", "condition", ".1f"))}


@torch.no_grad()
def layer_states(model: Transformer, windows: Sequence[Sequence[int]]) -> Iterator[States]:
    """The States of layer 0, 1, ...: windows [N][T] of ids pass one layer after the other."""
    T, device, D = len(windows[0]), model.embed.weight.device, model.config.head_dim
    pos = torch.arange(T, device=device)[None]
    cos_sin, hidden = Rope(model.config, T).to(device)(pos), [model.embed(torch.tensor([w], device=device)) for w in windows]
    for layer, block in enumerate(model.layers):
        progress(f"layer {layer + 1} of {len(model.layers)}")
        caches = [RecordingLayer(model.config.sliding_window) for _ in hidden]
        hidden = [model.run_layers(x, [layer], [c], cos_sin, pos, pos >= 0) for x, c in zip(hidden, caches, strict=True)]
        wo = block.attention.wo.weight.float().unflatten(1, (-1, D))
        yield States(*(torch.cat([getattr(c, x) for c in caches]).float() for x in "qkv"), wo)


def head_order(first: States, other: States) -> Tensor:
    """order [G]: the kv head of `other` to set beside each of `first`, by what their products keep; greedy, then swaps that help."""
    def flat(x: Tensor) -> Tensor:
        x = x.transpose(0, 1).flatten(1, 2)
        return x / x.square().sum((1, 2), keepdim=True).sqrt().clamp_min(1e-20)
    G, (ka, kb, va, vb) = first.k.shape[1], map(flat, (first.k, other.k, first.v, other.v))
    keys = torch.einsum("gtf,htf->ghf", as_complex(ka), as_complex(kb).conj()).abs().sum(-1)
    gain = keys + torch.linalg.svdvals(torch.einsum("gtd,hte->ghde", va, vb)).sum(-1)                 # [G, G]
    order, left = [-1] * G, gain.clone()
    for _ in range(G):
        g, h = divmod(int(left.argmax()), G)
        order[g] = h
        left[g], left[:, h] = float("-inf"), float("-inf")
    better = True
    while better:
        better = False
        for g, h in combinations(range(G), 2):
            if gain[g, order[h]] + gain[h, order[g]] > gain[g, order[g]] + gain[h, order[h]] + 1e-6:
                order[g], order[h], better = order[h], order[g], True
    return torch.tensor(order, device=first.k.device)


def start_loss(states: Sequence[States], cache: CacheConfig, sliding_window: int | None) -> float:
    """What a group loses in the coordinates of the closed form: cheap, to choose between pairs."""
    group = Group(states, cache, sliding_window)
    return sum(group.judge(x, group.start(x)) for x in merged_kinds(cache))


def merged_kinds(cache: CacheConfig) -> str:
    return "k" * cache.merge_k + "v" * cache.merge_v


def fit(layers: Sequence[int], states: Sequence[States], cache: CacheConfig, sliding_window: int | None, *, steps: int,
        invertible: bool) -> tuple[dict[int, LayerMap], dict]:
    """The maps of one group and its row of the table, kept where the windows not fitted say so (with a head order: K and V together)."""
    G, kinds = states[0].k.shape[1], merged_kinds(cache)
    own = torch.arange(G, device=states[0].k.device)
    orders = [[own] * len(layers), [own] + [head_order(states[0], s) for s in states[1:]]]
    groups = [Group([s.in_order(o) for s, o in zip(states, order, strict=True)], cache, sliding_window) for order in orders]
    before = {x: groups[0].judge(x, groups[0].own[x]) for x in kinds}
    # 1. the order of heads whose closed form loses less
    starts = [{x: g.start(x) for x in kinds} for g in groups]
    at = min(range(2), key=lambda i: sum(groups[i].judge(x, m) for x, m in starts[i].items()))
    group, maps, after = groups[at], dict(groups[at].own), {}
    # 2. the maps, refined where the loss falls; the checkpoint's own where nothing beats them
    for x in kinds:
        choices = [starts[at][x], group.refine(x, starts[at][x], steps=steps, invertible=invertible)] + [group.own[x]] * (at == 0)
        after[x], maps[x] = min(((group.judge(x, m), m) for m in choices), key=lambda pair: pair[0])
    if at and sum(after.values()) >= sum(before.values()):
        maps, after, at = dict(groups[0].own), before, 0
    found = {layer: LayerMap(order.cpu(), k.cpu(), v.contiguous().cpu())
             for layer, order, k, v in zip(layers, orders[at], maps["k"], maps["v"], strict=True)}
    row = {"group": "-".join(map(str, layers)), "order": " ".join(",".join(map(str, m.order.tolist())) for m in found.values())}
    for x in kinds:
        s = stretch(maps[x])
        row |= {f"{x}_before": before[x], f"{x}_after": after[x], f"{x}_condition": float((s.amax(-1) / s.amin(-1)).max())}
    return found, row


def choose_pairs(states: dict[int, States], cache: CacheConfig, sliding_window: int | None) -> list[tuple[int, ...]]:
    """All layers of `states` in pairs of little loss: the cheapest first, then two pairs change partners while that helps."""
    cost = {}
    for pair in combinations(sorted(states), 2):
        progress(f"pair {pair[0]}-{pair[1]}")
        cost[pair] = start_loss([states[layer] for layer in pair], cache, sliding_window)
    pairs: list[tuple[int, int]] = []
    for pair in sorted(cost, key=cost.get):
        if not any(layer in other for layer in pair for other in pairs):
            pairs.append(pair)
    better = True
    while better:
        better = False
        for i, j in combinations(range(len(pairs)), 2):
            (a, b), (c, d) = pairs[i], pairs[j]
            for new in (((a, c), (b, d)), ((a, d), (b, c))):
                new = tuple(tuple(sorted(pair)) for pair in new)
                if cost[new[0]] + cost[new[1]] < cost[pairs[i]] + cost[pairs[j]] - 1e-9:
                    (pairs[i], pairs[j]), better = new, True
    return sorted(pairs)


@torch.no_grad()
def folding_loss(model: Transformer, alignment: Alignment, cache: CacheConfig, windows: Sequence[Sequence[int]]) -> dict[str, float]:
    """What folding does to the model, full attention: the largest change of a logit, and KL (nats per token) once rounded to bf16."""
    def predict() -> Tensor:
        T, device = len(windows[0]), model.embed.weight.device
        pos = torch.arange(T, device=device)[None]
        caches = [RecordingLayer(model.config.sliding_window) for _ in model.layers]
        x = model.embed(torch.tensor(windows, device=device))
        return model.logits(model.run_layers(x, range(len(caches)), caches, Rope(model.config, T).to(device)(pos), pos, pos >= 0))

    def kl(p: Tensor, q: Tensor) -> float:
        p, q = p.log_softmax(-1), q.log_softmax(-1)
        return float((p.exp() * (p - q)).sum(-1).mean())
    before = predict()
    with aligned(model, alignment, cache):
        largest = float((predict() - before).abs().max())
        for layer in alignment.layers:
            for p in model.layers[layer].attention.parameters():
                p.copy_(p.bfloat16())
        return {"largest_logit_change": largest, "bf16_kl_nats_per_token": kl(before, predict())}


def run(args: argparse.Namespace) -> int:
    """The subject `align` of bench.py -> exit status."""
    # 1. all that can be refused
    if Path(args.out).suffix != ".safetensors":
        raise ValueError(f"--out {args.out} is not a .safetensors file; an alignment is written as safetensors")
    check_outputs(args.out, None)
    (device, dtype), (checkpoint, config, tokenizer) = device_and_dtype(args), open_checkpoint(args.checkpoint)
    cache = CacheConfig.parse(args.cache)
    groups = [group for group in cache.layer_groups(config.n_layer) if len(group) > 1]
    if not groups:
        raise ValueError(f"--cache {args.cache} merges no layers of {config.n_layer}; give a minicache SPEC that does")
    if args.pairs == "any" and any(len(group) != 2 for group in groups):
        raise ValueError(f"--pairs any makes pairs, --cache {args.cache} merges {max(map(len, groups))} layers; leave out one of them")
    if cache.granularity != "head":
        raise ValueError(f"--cache {args.cache} merges over all heads; an alignment is fitted head by head: leave granularity out")
    if not 8 <= args.context <= config.max_position_embeddings:
        raise ValueError(f"--context is {args.context}; give 8 to {config.max_position_embeddings}, the model's positions")
    for option, least in (("windows", 2), ("steps", 0)):
        if getattr(args, option) < least:
            raise ValueError(f"--{option} is {getattr(args, option)}; give at least {least}")
    windows = read_windows(args.text, tokenizer, n_tokens=args.context, n_windows=args.windows)
    # 2. the work: a group is fitted as soon as its layers are there
    model = load_model(checkpoint, device=device, dtype=settle_cpu(config, device, dtype))
    options = dict(steps=args.steps, invertible=args.map == "invertible")
    states, maps, rows, merged = {}, {}, [], {layer for group in groups for layer in group}
    for layer, s in enumerate(layer_states(model, windows)):
        if layer in merged:
            states[layer] = s
        if args.pairs == "any":
            if layer < max(merged):
                continue
            groups = choose_pairs(states, cache, config.sliding_window)
        for group in groups:
            if states.keys() >= set(group):
                found, row = fit(group, [states.pop(member) for member in group], cache, config.sliding_window, **options)
                maps |= found
                rows.append(row)
        if layer == max(merged):
            break
    alignment = Alignment(tuple(groups), maps)
    spec = args.cache
    if args.pairs == "any":
        spec = str(replace(cache, pairs=":".join("-".join(map(str, group)) for group in groups), merge_from=CacheConfig.merge_from))
    write_alignment(args.out, alignment, kind=args.map)
    # 3. the report
    print(f"{Path(args.text).name}: {args.context * args.windows:,} tokens in {args.windows} windows; {checkpoint.name}, "
          f"{str(model.embed.weight.dtype).removeprefix('torch.')} on {device}; {args.map} maps\n"
          "loss: squared error of the attention's output, relative to it, mean of the layers, on the windows that choose\n")
    print_table(rows, COLUMNS)
    change = folding_loss(model, alignment, CacheConfig.parse(spec), windows[-2:])
    print(f"\nfull attention, folded: a logit changes by {change['largest_logit_change']:.1e} at most; rounded to bf16, KL "
          f"{change['bf16_kl_nats_per_token']:.1e} nats per token\n{args.out} serves {spec}")
    return 0
