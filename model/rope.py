"""Rotary positions in the Hugging Face rotate-half layout: frequencies of every supported kind, tables, application.

Contract: frequencies, angles, cos and sin are fp32 whatever the model's dtype; longrope's choice between its short and
long factors is made once, from the capacity, because keys already stored cannot be rotated again.
Trap: in this layout coordinate i turns with coordinate i + D/2, not with its neighbour.
"""
import math

import torch
import torch.nn as nn
from torch import Tensor

from model.config import ModelConfig


def rope_frequencies(
        config: ModelConfig, max_seq_len: int, *, device: torch.device | str | None = None) -> tuple[Tensor, float]:
    """Angle per position for each coordinate pair [D/2] fp32, and the factor on cos and sin (1 except for longrope)."""
    rope = config.rope
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device) / config.head_dim
    if rope.kind == "longrope":
        factors = rope.long_factor if max_seq_len > rope.original_max_position_embeddings else rope.short_factor
        factor = torch.tensor(factors, dtype=torch.float32, device=device)
        return 1.0 / (factor * rope.theta**exponent), rope.attention_scaling
    inv_freq = 1.0 / rope.theta**exponent
    if rope.kind == "linear":
        inv_freq = inv_freq / rope.factor
    elif rope.kind == "llama3":
        # Few turns within the original length: divided by factor; many: kept; those between are blended.
        turns = rope.original_max_position_embeddings * inv_freq / (2 * math.pi)
        keep = ((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)).clamp(0, 1)
        inv_freq = inv_freq * (keep + (1 - keep) / rope.factor)
    return inv_freq, 1.0


class Rope(nn.Module):
    """Positions -> cos and sin, for one capacity."""

    def __init__(self, config: ModelConfig, max_seq_len: int, *, device: torch.device | str | None = None) -> None:
        super().__init__()
        inv_freq, self.scaling = rope_frequencies(config, max_seq_len, device=device)
        self.register_buffer("inv_freq", inv_freq, persistent=False)

    def forward(self, input_pos: Tensor) -> tuple[Tensor, Tensor]:
        """input_pos [B, T] integer -> (cos, sin), each [B, 1, T, D] fp32 and multiplied by the scaling."""
        angle = input_pos[:, None, :, None].float() * self.inv_freq
        angle = torch.cat((angle, angle), -1)
        # stacked: of several rows the compiler stores them, where it would else compute them anew in every layer
        return (torch.stack((angle.cos(), angle.sin())) * self.scaling).unbind()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [B, N, T, D] by cos, sin [B, 1, T, D] in fp32 -> [B, N, T, D] in x's dtype."""
    x1, x2 = x.chunk(2, -1)
    return (x * cos + torch.cat((-x2, x1), -1) * sin).to(x.dtype)
