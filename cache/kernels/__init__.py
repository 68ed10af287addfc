"""Fast forms of the two uses of a cache, as operators: C++ on CPU, Triton on CUDA. The reference is plain PyTorch, inlined.

    minicache::attend(...) -> y [B, H, 1, D] in `dtype`, from q [B, H, 1, D], k and v [B, G, 1, D]                 cache/base.py
    minicache::commit(...), k and v [n, B', G, T, D], rows [B'] int64: SplitGroup.commit for n <= 2, heads apart   cache/split.py

Both take the buffers of one layer group as they are, in the order in which SplitGroup registers them; attend only reads, commit writes in
place. `threshold` [B, G] says above which scores retained slots count, empty: all filled ones do; `n_new` [B'] is int64, for one token
also bool. Triton commits a step's tokens (T = 1, all rows); of a prompt it stores the merged columns (triton_commit.py), the reference
retains and moves the window. To write into a full cache is to commit to a window as long as it. Where a part is absent its tensors are
empty: no magnitudes (the full cache), no retained slots, no window, no codes. Codes are uint8; their bits follow from the last dimension.
Trap: an operator that wrote what its schema does not mark would be right in eager and wrong when compiled.
"""
import torch
from torch import Tensor

# define + impl: a call costs 4 us, @custom_op over 20
library = torch.library.Library("minicache", "DEF")
library.define(
    "attend(Tensor q, Tensor k, Tensor v, Tensor length, Tensor threshold, Tensor k_direction, Tensor v_direction, Tensor k_magnitude, "
    "Tensor v_magnitude, Tensor exact, Tensor k_retained, Tensor v_retained, Tensor retained_pos, Tensor retained_score, "
    "Tensor score_range, Tensor overflow, Tensor k_window, Tensor v_window, Tensor rotation, Tensor k_levels, Tensor v_levels, "
    "int index, int sliding_window, ScalarType dtype) -> Tensor")
library.define(
    "commit(Tensor k, Tensor v, Tensor length, Tensor n_new, Tensor? rows, Tensor(a!) k_direction, Tensor(b!) v_direction, "
    "Tensor(c!) k_magnitude, Tensor(d!) v_magnitude, Tensor(e!) exact, Tensor(f!) k_retained, Tensor(g!) v_retained, "
    "Tensor(h!) retained_pos, Tensor(i!) retained_score, Tensor(j!) score_range, Tensor(k!) overflow, Tensor(l!) k_window, "
    "Tensor(m!) v_window, Tensor rotation, Tensor k_levels, Tensor v_levels, int rule, str coef, float t, str retention, float gamma, "
    "int sinks) -> ()")


@torch.library.register_fake("minicache::attend", lib=library)
def _(q: Tensor, *args) -> Tensor:
    return torch.empty(q.shape, dtype=args[-1], device=q.device)


@torch.library.register_fake("minicache::commit", lib=library)
def _(*args) -> None:
    pass


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
