"""From logits to one token per row, without a host sync and without a shared random state.

The noise of a row is a hash of (its seed, the token's position, the vocabulary entry), so a text depends on its own seed alone:
not on its neighbours in the batch, not on the device, not on what was sampled before.
"""
from dataclasses import dataclass

import torch
from torch import Tensor

_M32 = 0xFFFFFFFF


@dataclass(frozen=True)
class SamplingParams:
    """How one request is continued. temperature 0 is greedy; top_k 0 and top_p 1 keep everything; seed None draws one."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    stop_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}; ask for at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}; give a finite number, 0 (greedy) or more")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}; give 0 (off) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; give a number above 0 and at most 1 (off)")
        if self.seed is not None and not 0 <= self.seed < 2 ** 63:
            raise ValueError(f"seed is {self.seed}; give a number from 0 to 2**63 - 1")

    @property
    def method(self) -> str:
        """The cheapest of "greedy", "plain" (no sort) and "filtered" that can serve this request."""
        if self.temperature == 0:
            return "greedy"
        return "filtered" if self.top_k or self.top_p < 1 else "plain"


METHODS = ("greedy", "plain", "filtered")     # each can serve what those before it can


def sample(logits: Tensor, method: str, temperature: Tensor, top_k: Tensor, top_p: Tensor, seed: Tensor, position: Tensor) -> Tensor:
    """logits [B, V] fp32, everything else [B] -> token ids [B]. `position` is where the sampled token will stand."""
    greedy = logits.argmax(-1)
    if method == "greedy":
        return greedy
    scaled = logits / temperature.clamp_min(1e-5)[:, None]
    if method == "filtered":
        ordered = scaled.sort(-1, descending=True).values
        rank = torch.arange(logits.shape[-1], device=logits.device)
        keep = rank < torch.where(top_k > 0, top_k, logits.shape[-1])[:, None]
        p = ordered.masked_fill(~keep, float("-inf")).softmax(-1)       # top_p is a share of what top_k leaves
        share = torch.where(top_p < 1, top_p, torch.inf)        # a rounded sum may pass 1 before the tail
        keep = keep & (p.cumsum(-1) - p < share[:, None]) | (rank == 0)
        least = ordered.masked_fill(~keep, float("inf")).amin(-1, keepdim=True)
        scaled = scaled.masked_fill(scaled < least, float("-inf"))
    drawn = (scaled.softmax(-1) / exponential_noise(seed, position, logits.shape[-1])).argmax(-1)     # the exponential race
    return torch.where(temperature > 0, drawn, greedy)


def exponential_noise(seed: Tensor, position: Tensor, size: int) -> Tensor:
    """seed, position [B] int64 -> [B, size] fp32 samples of Exp(1), a pure function of (seed, position, index)."""
    key = _mix((seed & _M32) ^ _mix(seed >> 32 & _M32) ^ _mix(position * 0x9E3779B1 & _M32))
    index = torch.arange(size, device=seed.device)
    bits = _mix(_mix(index * 0x85EBCA77 & _M32) ^ key[:, None])
    return -(((bits >> 9).float() + 0.5) * 2.0 ** -23).log()        # 23 bits: every value is exact and strictly inside (0, 1)


def _mix(x: Tensor) -> Tensor:
    """The 32-bit finaliser of MurmurHash3 (public domain), on int64."""
    x = (x ^ x >> 16) * 0x85EBCA6B & _M32
    x = (x ^ x >> 13) * 0xC2B2AE35 & _M32
    return x ^ x >> 16
