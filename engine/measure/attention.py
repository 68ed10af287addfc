"""The time of one layer's attention for one new token per row: every form of every cache beside SDPA on bf16 K and V. Storing the token
has rows of its own (commit): once a step for all layers of the group.

Contract: all sides take turns in one run, each call on cold caches, as in a decode step where other layers and the weights pass in between.
The last call of a turn counts: after a side that slept, or kept one core busy, a CPU's first calls take up to twice as long.
Bytes are what must be read of the filled part, whatever a form touches. A merged SPEC is one merged group; its unmerged layers are another.
Trap: with enable_gqa SDPA can be ten times slower than with the heads of a kv head as its queries: judge by the better of the two.
"""
import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

from cache import CacheConfig
from cache.base import LayerGroup, attend_exact
from cache.build import build_cache, cache_bytes
from cache.full import FullLayer
from engine.measure.card import measure_rates
from engine.measure.report import check_outputs, machine, new_figure, print_table, progress, save_figure, write_json
from options import device_and_dtype
from weights import available_bytes

CACHES, PIECE = ["full", "quant,bits=4", "minicache,bits=4"], 512      # PIECE: tokens a commit
COLD_BYTES = 1 << 28        # read before each call: more than the last cache of most CPUs and of any GPU
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION}
ROUNDS, SECONDS = 25, 20    # turns of each side at most, after one that warms up; and the time after which three are enough
SETTLE = .1                 # seconds of a turn, unless one call takes longer
COLUMNS = {"cache": ("cache", ""), "form": ("form", ""), "capacity": ("capacity", ","), "filled_tokens": ("filled", ","),
           "median_ms": ("ms", ".3f"), "bytes_read": ("bytes read", ","), "gb_per_s": ("GB/s", ".2f"),
           "share_of_bandwidth": ("of bandwidth", ".0%"), "speedup_over_sdpa": ("x enable_gqa", ".2f"),
           "speedup_over_best_sdpa": ("x best SDPA", ".2f")}


def run(args: argparse.Namespace) -> int:
    """The subject `attention` of bench.py -> exit status."""
    # 1. all that can be refused
    check_outputs(args.out, args.plot)
    device, dtype = device_and_dtype(args)
    B, H, G, D, S = args.batch, args.heads, args.kv_heads, args.head_dim, args.seq
    filled = S - 1 if args.filled is None else args.filled
    for name, value, least in (("heads", H, 1), ("kv-heads", G, 1), ("head-dim", D, 1), ("batch", B, 1), ("seq", S, 2)):
        if value < least:
            raise ValueError(f"--{name} is {value}; give at least {least}")
    if H % G:
        raise ValueError(f"--heads {H} is not a multiple of --kv-heads {G}; every kv head serves the same number of heads")
    if not 1 <= filled < S:
        raise ValueError(f"--filled is {filled}; give 1 to {S - 1}, which leaves room for the new token in --seq {S}")
    specs, shape = list(dict.fromkeys(args.cache or CACHES)), dict(n_kv_head=G, head_dim=D, batch=B, dtype=dtype)
    configs = [one_group(CacheConfig.parse(spec)) for spec in specs]
    # a cache that is far from full has one that is full beside it: does time follow the tokens or the capacity?
    plans = [(spec, c, dict(n_layer=c.group if c.kind == "minicache" else 1, max_seq_len=capacity, **shape))
             for spec, c in zip(specs, configs, strict=True) for capacity in dict.fromkeys((S, filled + 1))]
    # bf16 K and V are 4 bytes; a reference form that decodes both in fp32 holds about five times that of the capacity for a moment
    need = COLD_BYTES + 4 * B * G * filled * D + sum(sum(cache_bytes(c, **plan).values()) for _, c, plan in plans)
    need += 20 * B * G * S * D * any(c.attend_form in ("auto", "reference") for c in configs)
    room = available_bytes(device)
    if room is not None and need > room:
        raise ValueError(f"the caches and their scratch need about {need:,} bytes, {device} has {room:,}; lower --batch or --seq")
    # 2. the sides
    caches = [(spec, c, plan["max_seq_len"], build_cache(c, **plan, device=device).groups[0]) for spec, c, plan in plans]
    rates, generator = measure_rates(device, dtype), torch.Generator(device).manual_seed(0)
    k16, v16 = (torch.randn(B, G, filled, D, generator=generator, device=device).bfloat16() for _ in "kv")
    q = torch.randn(B, H, 1, D, generator=generator, device=device).to(dtype)
    k, v = torch.randn(2, B, G, 1, D, generator=generator, device=device).to(dtype)
    # 3. the measurements, at growing lengths for a plot
    rows, stored = [], 0
    for n in sorted({max(1, filled >> i) for i in range(4)}) if args.plot else [filled]:
        progress(f"storing {n:,} tokens in {len(caches)} caches, then timing")
        length, full = torch.full((B,), n, device=device), [x[:, :, :n] for x in (k16, v16)]
        rivals = bf16_forms(q.bfloat16(), *full, by_name=device.type == "cuda")
        labels = [{"cache": "bf16 K and V", "form": form, "capacity": None, "bytes_read": sum(x.nbytes for x in full)} for form in rivals]
        sides = list(rivals.values())
        for spec, config, capacity, group in caches:
            fill(group, stored, n, like=k, generator=generator)
            for form in forms_of(group, config) if capacity == S else [group.form]:
                labels.append({"cache": spec, "form": form, "capacity": capacity, "bytes_read": bytes_read(group, n)})
                sides.append(attend_call(group, form, q, k, v, length))
        for spec, config, capacity, group in caches:
            for form in () if capacity < S else forms_of(group, config) if group.commits_fast else ["reference"]:
                labels.append({"cache": spec, "form": f"commit, {form}", "capacity": capacity, "bytes_read": None})
                sides.append(commit_call(group, form, k, v, length))
        stored = n
        with torch.cuda.device_of(q):       # a no-op for a CPU tensor
            seconds = median_seconds(sides, device)
        for label, taken in zip(labels, seconds, strict=True):
            row = label | {"filled_tokens": n, "median_ms": taken * 1e3}
            if label["bytes_read"]:
                speed = label["bytes_read"] / taken
                row |= {"gb_per_s": speed / 1e9, "share_of_bandwidth": speed / rates["read_bytes_per_s"],
                        "speedup_over_sdpa": seconds[0] / taken, "speedup_over_best_sdpa": min(seconds[:len(rivals)]) / taken}
            rows.append(row)
    # 4. the report
    print(f"one layer, one new token in each of {B} rows, {H}/{G} heads of {D}; {args.dtype} on {device}, "
          f"{torch.get_num_threads()} threads; reads {rates['read_bytes_per_s'] / 1e9:.1f} GB/s (measured)\n"
          "bytes read: those that must be, of the filled part; x: times as fast as attention on a bf16 full cache of that length\n")
    print_table(rows, COLUMNS)
    write_json(args.out, {"subject": "attention", "machine": machine(device), "rates": rates, "rows": rows,
                          "settings": vars(args) | {"cache": specs, "filled": filled, "device": str(device)}})
    if args.plot:
        plot([row for row in rows if row["capacity"] in (None, S)], args.plot)
    return 0


def bf16_forms(q: Tensor, k: Tensor, v: Tensor, *, by_name: bool) -> dict[str, Callable[[], Tensor]]:
    """What PyTorch has for q [B, H, 1, D] on whole K, V [B, G, N, D]. by_name: also each kernel of SDPA that takes these shapes, and flex
    attention, compiled: a GPU's dispatcher need not choose the fastest."""
    wide, gqa = q.view(*k.shape[:2], -1, q.shape[3]), q.shape[1] != k.shape[1]

    def sdpa(q: Tensor, backend: SDPBackend | None = None) -> Tensor:
        with sdpa_kernel(backend) if backend else nullcontext():
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1])

    forms = {"SDPA, enable_gqa": lambda: sdpa(q), "SDPA, heads as queries": lambda: sdpa(wide)}
    if by_name:
        flex = torch.compile(flex_attention, dynamic=False)
        forms |= {f"SDPA, {name}": lambda kind=kind: sdpa(wide, kind) for name, kind in BACKENDS.items()}
        forms["flex"] = lambda: flex(q, k, v, enable_gqa=gqa)
    return {name: form for name, form in forms.items() if runs(form)}


def runs(form: Callable[[], Tensor]) -> bool:
    try:
        form()
    except (RuntimeError, ValueError):      # no such kernel here, or not for these shapes
        return False
    return True


def forms_of(group: LayerGroup, config: CacheConfig) -> list[str]:
    return list(dict.fromkeys(["reference", group.form] if config.attend_form == "auto" else [group.form]))


def one_group(cache: CacheConfig) -> CacheConfig:
    """The same cache for the layers of one merged group alone: of the first, where SPEC names them."""
    return replace(cache, merge_from=0, pairs="", group=cache.pairs.partition(":")[0].count("-") + 1 if cache.pairs else cache.group)


def fill(group: LayerGroup, start: int, stop: int, *, like: Tensor, generator: torch.Generator) -> None:
    """Random tokens start .. stop for every row and layer of the group; like [B, G, 1, D]."""
    B, G, _, D = like.shape
    for at in range(start, stop, PIECE):
        k, v = torch.randn(2, len(group.layers), B, G, min(PIECE, stop - at), D, generator=generator, device=like.device).to(like.dtype)
        group.commit(k, v, torch.full((B,), at, device=like.device), torch.full((B,), k.shape[3], device=like.device))


def bytes_read(group: LayerGroup, length: int) -> int:
    """What one layer must read of `length` stored tokens in every row: columns that a retained token masks count by their flag alone."""
    if isinstance(group, FullLayer):
        return 2 * group.k[:, :, :length].numel() * group.k.element_size()
    heads, columns, active = group.exact.shape[0] * group.exact.shape[1], max(length - group.W, 0), int(group.active().sum())
    merged = sum(x.shape[-1] * x.element_size() for x in (group.k_direction, group.v_direction)) + 2 * group.k_magnitude.element_size()
    exact = 2 * group.k_retained.shape[-1] * group.k_retained.element_size()
    flags = heads * ((columns if group.R else 0) + 8 * group.R)     # a byte a column; position and score of a slot
    return (heads * columns - active) * merged + (active + heads * min(length, group.W)) * exact + flags


def attend_call(group: LayerGroup, form: str, q: Tensor, k: Tensor, v: Tensor, length: Tensor) -> Callable[[], Tensor]:
    """One layer's attention, the new token not stored. The reference of a full cache is SDPA over its whole capacity."""
    if form != "reference":
        return lambda: group.attend_fast(0, q, k, v, length)
    if isinstance(group, FullLayer):
        mask = (torch.arange(group.k.shape[2], device=q.device) <= length[:, None])[:, None, None]
        return lambda: attend_exact(q, group.k, group.v, mask)
    return lambda: group.attend_reference(0, q, k, v, length[:, None], None)


def commit_call(group: LayerGroup, form: str, k: Tensor, v: Tensor, length: Tensor) -> Callable[[], None]:
    """One new token per row stored for all layers of the group, at the same place in every call."""
    k, v = (x.expand(len(group.layers), *x.shape).contiguous() for x in (k, v))
    n_new = torch.ones_like(length)

    def call() -> None:
        before, group.form = group.form, form
        group.commit(k, v, length, n_new)
        group.form = before

    return call


def median_seconds(sides: Sequence[Callable[[], object]], device: torch.device) -> list[float]:
    """Every side's median, one turn of each a round, every other round backwards, so that neighbours follow each other alike. On CUDA a
    call is a CUDA graph, as in a decode step, timed by events."""
    cuda, cold, seconds, calls = device.type == "cuda", torch.ones(COLD_BYTES // 4, device=device), [[] for _ in sides], list(sides)
    pool = torch.cuda.graph_pool_handle() if cuda else None     # graphs that run one at a time share their scratch
    for i, side in enumerate(sides if cuda else ()):
        side()      # compiles, outside the capture
        torch.cuda.empty_cache()        # the graphs' pool cannot take what that call leaves cached
        with torch.cuda.graph(graph := torch.cuda.CUDAGraph(), pool=pool):
            side()
        calls[i] = graph.replay
    begin = time.perf_counter()
    while len(seconds[0]) <= ROUNDS and (len(seconds[0]) <= 3 or time.perf_counter() - begin < SECONDS):
        for call, taken in list(zip(calls, seconds, strict=True))[::-1 if len(seconds[0]) % 2 else 1]:
            taken.append(turn(call, cold))
    return [statistics.median(taken[1:]) for taken in seconds]


def turn(call: Callable[[], object], cold: Tensor) -> float:
    """Seconds that the last call took, of as many as SETTLE has room for; `cold` is read before each."""
    begin, cuda = time.perf_counter(), cold.is_cuda
    while True:
        cold.sum()
        first, last = (torch.cuda.Event(enable_timing=True) if cuda else None for _ in range(2))
        start = first.record() if cuda else time.perf_counter()
        call()
        if cuda:
            last.record()
            last.synchronize()
        seconds = first.elapsed_time(last) / 1e3 if cuda else time.perf_counter() - start
        if time.perf_counter() - begin >= SETTLE:
            return seconds


def plot(rows: Sequence[dict], path: str) -> None:
    """Time over the stored tokens, one line a cache and form."""
    figure, ((axes,),) = new_figure(1, 1, width=8, height=5)
    rows = [row for row in rows if row["bytes_read"]]       # attention alone
    for name in dict.fromkeys((row["cache"], row["form"]) for row in rows):
        filled, ms = zip(*[(row["filled_tokens"], row["median_ms"]) for row in rows if (row["cache"], row["form"]) == name], strict=True)
        axes.plot(filled, ms, marker="o", label=", ".join(name))
    axes.set(title="One layer's attention, one new token per row", xlabel="stored tokens per row", ylabel="ms", xscale="log", yscale="log")
    axes.legend(fontsize="small")
    save_figure(figure, path)
