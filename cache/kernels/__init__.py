"""Fast forms of `attend` for one new token per row, as one operator: Triton on CUDA, C++ on CPU. The reference is cache/base.py, inlined.

    minicache::attend(...) -> (y, y_rotated), both [B, H, D] fp32; attention is y + y_rotated @ rotation^T

It reads the buffers of one layer group as they are (see SplitGroup) and writes nothing. Where a part is absent its tensors are empty:
no magnitudes (the full cache), no retained slots, no window, no codes. Codes are uint8; their bits follow from the last dimension.
"""
import torch
from torch import Tensor

# define + impl: a call costs 4 us, @custom_op over 20
library = torch.library.Library("minicache", "DEF")
library.define(
    "attend(Tensor q, Tensor q_rotated, Tensor k, Tensor v, Tensor length, Tensor k_stored, Tensor v_stored, Tensor k_magnitude, "
    "Tensor v_magnitude, Tensor exact, Tensor k_retained, Tensor v_retained, Tensor retained_pos, Tensor retained_score, Tensor threshold, "
    "Tensor k_window, Tensor v_window, Tensor k_levels, Tensor v_levels, int index, int sliding_window) -> (Tensor, Tensor)")


@torch.library.register_fake("minicache::attend", lib=library)
def _(q: Tensor, *args) -> tuple[Tensor, Tensor]:
    return torch.empty(q.shape, device=q.device), torch.empty(q.shape, device=q.device)


def choose_form(form: str, device: torch.device | str) -> str:
    """The form that `form` means on `device`: by name, or for "auto" the fast one where it can be had, else "reference".

    ValueError for a name that cannot be had. On "meta" nothing is built.
    """
    kind = torch.device(device).type
    if form == "reference" or kind == "meta":
        return "reference"
    fast = {"cpu": "cpp", "cuda": "triton"}.get(kind)
    if form in ("auto", fast):
        if kind == "cpu":
            from cache.kernels.cpp import load
        else:
            from cache.kernels.triton_attend import load
        if load():
            return fast
        if form == "auto":
            return "reference"
    raise ValueError(f"attend_form={form} cannot be had on {device}; choose auto or reference")
