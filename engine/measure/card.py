"""The static card: bytes, ceilings and rows that fit, from integers alone. Nothing is allocated but the buffers of `measure_rates`.

Contract: KV bytes are `cache_bytes`, everything counted. A step must read the weights it uses once, and every stored column of a row once
a layer: layers that share a direction read it once each, so merging saves capacity, not reading. Ceiling of a step: the slower of
weights / bandwidth and linear FLOPs / matmul rate, plus KV / bandwidth (the two alternate layer by layer, so they do not overlap).
Trap: `rows_that_fit` counts prefill scratch by an estimate, and none of the temporaries that a reference form of attention makes.
"""
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from cache import CacheConfig, bits_per_element
from cache.build import cache_bytes
from engine.engine import PREFILL_BUDGET, PREFILL_CHUNK
from model import ModelConfig
from weights import available_bytes

READ_BYTES = 1 << 30        # larger than the last cache of any CPU or GPU


def parameter_counts(c: ModelConfig) -> dict[str, int]:
    """Parameters by use: embed (a gather; 0 where tied to the head), shared (read in every step), expert (one expert of all layers)."""
    q, kv, mlp = c.n_head * c.head_dim, c.n_kv_head * c.head_dim, 3 * c.intermediate_size * c.dim
    layer = 2 * c.dim + c.dim * (2 * q + 2 * kv) + (c.n_expert * c.dim if c.n_expert else mlp)
    return {"embed": 0 if c.tie_word_embeddings else c.vocab_size * c.dim, "shared": c.n_layer * layer + c.dim + c.vocab_size * c.dim,
            "expert": c.n_layer * mlp if c.n_expert else 0}


def weight_bytes(c: ModelConfig, dtype: torch.dtype) -> int:
    n = parameter_counts(c)
    return (n["embed"] + n["shared"] + c.n_expert * n["expert"]) * dtype.itemsize


def kv_bytes(c: ModelConfig, cache: CacheConfig, *, batch: int, capacity: int, dtype: torch.dtype) -> dict[str, int]:
    """Bytes of the cache by kind, everything counted."""
    return cache_bytes(cache, n_layer=c.n_layer, n_kv_head=c.n_kv_head, head_dim=c.head_dim, batch=batch, max_seq_len=capacity, dtype=dtype)


def kv_read_bytes(c: ModelConfig, cache: CacheConfig, *, length: int, capacity: int, dtype: torch.dtype) -> int:
    """Bytes that a decode step must read of a row with `length` stored tokens, those inside the model's sliding window."""
    D, item, scale, total = c.head_dim, dtype.itemsize, 4 if dtype == torch.float32 else 2, 0
    seen = min(length, c.sliding_window or length)
    vector = sum(D * item if bits == 16 else D * bits // 8 for bits in (cache.k_bits, cache.v_bits))
    for group in cache.layer_groups(c.n_layer):
        if cache.is_full(group):
            total += seen * 2 * D * item
        else:
            W, R = min(cache.window, capacity, seen), cache.retained_slots(len(group), capacity)
            total += len(group) * ((seen - W) * (vector + 2 * scale + (1 if R else 0)) + 2 * (W + R) * D * item + 8 * R)
    return total * c.n_kv_head


def step_cost(c: ModelConfig, cache: CacheConfig, *, batch: int, length: int, capacity: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """One decode step of `batch` rows with `length` tokens each -> weight bytes read, KV bytes read, FLOPs of the linear layers."""
    n = parameter_counts(c)
    experts = min(batch * c.n_expert_per_token, c.n_expert)
    weights = (n["shared"] + experts * n["expert"]) * dtype.itemsize
    flops = 2 * batch * (n["shared"] + c.n_expert_per_token * n["expert"])
    return weights, batch * kv_read_bytes(c, cache, length=length, capacity=capacity, dtype=dtype), flops


def ceiling_tokens_per_s(cost: tuple[int, int, int], batch: int, rates: dict[str, float]) -> float:
    weights, kv, flops = cost
    seconds = max(weights / rates["read_bytes_per_s"], flops / rates["matmul_flop_per_s"]) + kv / rates["read_bytes_per_s"]
    return batch / seconds


def scratch_bytes(c: ModelConfig, cache: CacheConfig, *, batch: int, prompt_tokens: int, dtype: torch.dtype) -> int:
    """What a prefill and its logits need beside weights and cache, estimated: hidden states, one group's exact K and V, one chunk's MLP."""
    rows = min(batch, max(1, PREFILL_BUDGET // prompt_tokens))
    members, end = [0], -1          # of groups that pass the prompt together: see KVCache.spans
    for group in cache.layer_groups(c.n_layer):
        members = [*members, 0] if group[0] > end else members
        members[-1], end = members[-1] + len(group), max(end, group[-1])
    per_token = c.dim + 2 * max(members) * c.n_kv_head * c.head_dim
    chunk = rows * min(prompt_tokens, PREFILL_CHUNK) * (4 * c.intermediate_size + 3 * c.dim)
    return (rows * prompt_tokens * per_token + chunk) * dtype.itemsize + batch * c.vocab_size * (dtype.itemsize + 4)


def rows_that_fit(c: ModelConfig, cache: CacheConfig, *, memory: int, capacity: int, prompt_tokens: int, dtype: torch.dtype) -> int:
    """The most rows whose weights, cache and scratch stay within `memory` bytes; 0 where not even one does."""
    def need(rows: int) -> int:
        return (weight_bytes(c, dtype) + sum(kv_bytes(c, cache, batch=rows, capacity=capacity, dtype=dtype).values())
                + scratch_bytes(c, cache, batch=rows, prompt_tokens=prompt_tokens, dtype=dtype))
    low, high = 0, 1
    while need(high) <= memory:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if need(middle) <= memory else (low, middle)
    return low


def whole_rows(n: int, device: str) -> int:
    """On CUDA products of n rows should be multiples of this: of other than 8 they are padded, which the compiler would first measure; and
    they are computed in tiles of 128 rows, the last as dear as the others."""
    return 1 if not device.startswith("cuda") or n < 64 else 8 if n < 1024 else 128


def make_card(c: ModelConfig, spec: str, *, capacity: int, prompt_tokens: int, length: int, batches: list[int], dtype: torch.dtype,
              memory: int | None, rates: dict[str, float] | None = None) -> dict:
    """One cache's card. `length`: stored tokens a row in a typical step; `batches` empty: as many rows as fit; memory None: rows unknown;
    rates None: no ceiling."""
    cache = CacheConfig.parse(spec)
    by_kind = kv_bytes(c, cache, batch=1, capacity=capacity, dtype=dtype)
    total = sum(by_kind.values())
    bits = bits_per_element(total, n_layer=c.n_layer, n_kv_head=c.n_kv_head, head_dim=c.head_dim, batch=1, max_seq_len=capacity)
    shape = dict(capacity=capacity, dtype=dtype)
    rows = None if memory is None else rows_that_fit(c, cache, memory=memory, prompt_tokens=prompt_tokens, **shape)
    steps = []
    for batch in batches or [rows or 1]:
        cost = step_cost(c, cache, batch=batch, length=length, **shape)
        steps.append({"batch": batch, "step_bytes": cost[0] + cost[1],
                      "ceiling_tokens_per_s": rates and ceiling_tokens_per_s(cost, batch, rates)})
    return {"cache": spec, "capacity_tokens": capacity, "weight_bytes": weight_bytes(c, dtype), "kv_bytes_per_row": total,
            "kv_bytes_per_token": total / capacity, "kv_bytes_by_kind": by_kind, "bits_per_element": bits,
            "ratio_to_full": 16 / bits, "memory_bytes": memory, "rows_that_fit": rows,
            "scratch_bytes": scratch_bytes(c, cache, batch=rows or 1, prompt_tokens=prompt_tokens, dtype=dtype), "steps": steps}


def measure_rates(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Read bandwidth of this machine's memory (a sum over a large buffer) and rate of linear layers in `dtype`, on torch's threads: the
    best of a few.

    A model or cache small enough to stay in the processor's own cache may run above the ceiling that follows.
    """
    cuda = device.type == "cuda"
    size = READ_BYTES if cuda else min(READ_BYTES, (available_bytes(device) or READ_BYTES) // 4)
    rows, side = (8192, 8192) if cuda else (512, 1024)
    calls = 20 if cuda else 1       # a GPU is done before the host has waited for it

    def best(work: Callable[[], object]) -> float:
        seconds: list[float] = []
        while len(seconds) < 6 and sum(seconds) < 1:        # the first one warms up
            begin = time.perf_counter()
            for _ in range(calls):
                work()
            if cuda:
                torch.cuda.synchronize(device)
            seconds.append((time.perf_counter() - begin) / calls)
        return min(seconds[1:] or seconds)

    buffer = torch.ones(size // 4, device=device)
    read = buffer.nbytes / best(buffer.sum)
    del buffer
    x, weight = (torch.randn(n, side, device=device).to(dtype) for n in (rows, side))
    return {"read_bytes_per_s": read, "matmul_flop_per_s": 2 * rows * side ** 2 / best(lambda: F.linear(x, weight))}
