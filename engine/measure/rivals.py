"""What others do to a cache without merging, for comparison only: simulated, so the loss is theirs and the bytes are a formula.

    rtn,bits=4,group=32                  round to nearest between the least and largest of `group` channels of a token's head, K and V
    kivi,bits=2,group=32,residual=128    KIVI (arXiv 2402.02750, Algorithm 1): V likewise, K per channel over `group` tokens

Exact in KIVI are the newest `residual` tokens of V, and of K those after the last whole block of `residual` tokens. A token's own step
and a prompt's attention are exact, as for our caches. Codes carry scale and minimum in fp16: group=32 is what makes 4-bit rounding the
3.2x of MiniCache's comparison.
Trap: the buffers here are fp32 and hold decoded values, so their size says nothing; `nbytes` is what packed static buffers would take.
"""
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from cache import CacheConfig, KVCache
from cache.base import LayerGroup
from cache.config import KEYS
from cache.full import FullLayer

SETTINGS = {"rtn": ("bits", "group"), "kivi": ("bits", "group", "residual")}


@dataclass(frozen=True)
class Rival:
    """Given to an Engine as its cache, in place of a CacheConfig."""

    kind: str
    bits: int
    group: int
    residual: int

    def __post_init__(self) -> None:
        if self.bits not in (8, 4, 3, 2):
            raise ValueError(f"cache setting bits={self.bits} does not exist for {self.kind}; choose one of: 8, 4, 3, 2")
        if self.group < 1:
            raise ValueError(f"cache setting group={self.group} is less than 1; write for example group=32")
        if self.kind == "kivi" and (self.residual < 1 or self.residual % self.group):
            raise ValueError(f"cache setting residual={self.residual} is no multiple of group={self.group}; write for example residual=128")

    def __str__(self) -> str:
        return ",".join([self.kind] + [f"{f.name}={getattr(self, f.name)}" for f in fields(self) if f.name in SETTINGS[self.kind]])

    def build(self, *, n_layer: int, n_kv_head: int, head_dim: int, batch: int, max_seq_len: int, dtype: torch.dtype,
              device: torch.device | str, sliding_window: int | None = None) -> KVCache:
        if head_dim % self.group:
            raise ValueError(f"cache setting group={self.group} does not divide head_dim {head_dim}; choose a divisor of it")
        shape = dict(batch=batch, n_kv_head=n_kv_head, max_seq_len=max_seq_len, head_dim=head_dim, dtype=torch.float32, device=device,
                     sliding_window=sliding_window)
        return SimulatedCache([RivalLayer(layer, **shape) for layer in range(n_layer)], self, dtype)

    def nbytes(self, **shape) -> dict[str, int]:
        return self.build(**shape, device="meta").nbytes()

    def coded(self, x: str, length: Tensor | int) -> Tensor | int:
        """How many of `length` stored tokens of K or V are codes."""
        if self.kind == "rtn":
            return length
        return length // self.residual * self.residual if x == "k" else (length - self.residual) * (length > self.residual)


class RivalLayer(FullLayer):
    """A full layer in whose buffers a token's K and V turn into what their codes decode to, once, when they leave the exact ones."""

    rival: Rival
    attend = LayerGroup.attend      # over the stored columns and the step's own exact token; then commit

    def commit(self, k: Tensor, v: Tensor, length: Tensor, n_new: Tensor, rows: Tensor | None = None) -> None:
        super().commit(k, v, length, n_new, rows)
        column = torch.arange(self.k.shape[2], device=length.device)
        for x, buffer in (("k", self.k), ("v", self.v)):
            before, after = (self.rival.coded(x, n)[:, None] for n in (length, length + n_new))
            row, at = ((column >= before) & (column < after)).nonzero(as_tuple=True)
            if len(at):
                row, by_channel = row if rows is None else rows[row], x == "k" and self.rival.kind == "kivi"
                tokens = buffer[row, :, at]                             # [tokens, G, D], whole blocks in order where coded by channel
                groups = tokens.unflatten(0, (-1, self.rival.group)) if by_channel else tokens.unflatten(-1, (-1, self.rival.group))
                buffer[row, :, at] = round_to_nearest(groups, 1 if by_channel else -1, self.rival.bits).view_as(tokens)


class SimulatedCache(KVCache):
    """RivalLayers, and the bytes of packed buffers of the same capacity: `residual` slots and all others as codes, for K and for V."""

    def __init__(self, groups: Sequence[RivalLayer], rival: Rival, dtype: torch.dtype) -> None:
        super().__init__(groups)
        self.rival, self.dtype = rival, dtype
        for group in groups:
            group.rival = rival

    def nbytes(self) -> dict[str, int]:
        B, G, S, D = self.groups[0].k.shape
        heads, r = len(self.groups) * B * G, self.rival
        coded = r.coded("k", S) + r.coded("v", S)
        kinds = {"codes": heads * coded * D * r.bits // 8, "scales": heads * coded * D // r.group * 4}
        return kinds | ({"residual": heads * 2 * min(r.residual, S) * D * self.dtype.itemsize} if r.residual else {})


def round_to_nearest(x: Tensor, dim: int, bits: int) -> Tensor:
    """Codes 0 .. 2**bits - 1 between the least and the largest value along `dim`, decoded again; scale and least value in fp16."""
    least = x.amin(dim, keepdim=True).half().float()
    scale = ((x.amax(dim, keepdim=True) - least) / (2 ** bits - 1)).half().float()
    return ((x - least) / scale.clamp_min(1e-8)).round().clamp(0, 2 ** bits - 1) * scale + least


def parse_cache(spec: str) -> CacheConfig | Rival:
    """A SPEC of generate.py, or one of a rival. ValueError names what is unknown and what exists."""
    kind, *settings = (part.strip() for part in spec.split(","))
    if kind in KEYS:
        return CacheConfig.parse(spec)
    if kind not in SETTINGS:
        raise ValueError(f"cache kind {kind!r} does not exist; choose one of: {', '.join([*KEYS, *SETTINGS])}")
    given, exist = {"bits": 4, "group": 32, "residual": 128 if kind == "kivi" else 0}, SETTINGS[kind]
    for setting in settings:
        key, _, value = setting.partition("=")
        if key not in exist or not value.isdecimal():
            raise ValueError(f"cache setting {setting!r} is not one of {kind}'s key=number settings; choose from: {', '.join(exist)}")
        given[key] = int(value)
    return Rival(kind, given["bits"], given["group"], given["residual"])
