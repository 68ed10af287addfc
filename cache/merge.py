"""The maths of merging: n vectors (one token's K or V at n layers) become one unit direction and one coefficient per layer.

A merge rule is one function: x [n, ..., D] fp32 and its norms [n, ...] -> an unnormalised direction [..., D]. To try your own, write it
and add it to RULES; layout, retention and attention follow. Every rule gives finite values for zero, parallel and anti-parallel vectors.
"""
from collections.abc import Callable

import torch
from torch import Tensor

TINY = 1e-20        # below any norm that matters, above fp32's smallest normal number


def slerp(x: Tensor, norm: Tensor, t: float, coef: str) -> Tensor:
    """Spherical interpolation from the earlier to the later layer, n = 2 (MiniCache Eq. 3; Algorithm 2 has the weights swapped)."""
    u = x / norm.clamp_min(TINY).unsqueeze(-1)
    angle = angle_between(u[0], u[1])
    sin = angle.sin()
    safe = sin > 1e-6                           # parallel and anti-parallel: linear interpolation
    a = torch.where(safe, ((1 - t) * angle).sin() / sin.clamp_min(1e-6), 1 - t)
    b = torch.where(safe, (t * angle).sin() / sin.clamp_min(1e-6), t)
    return a.unsqueeze(-1) * u[0] + b.unsqueeze(-1) * u[1]


def mean(x: Tensor, norm: Tensor, t: float, coef: str) -> Tensor:
    """The plain average, a baseline of the paper."""
    return x.mean(0)


def max_norm(x: Tensor, norm: Tensor, t: float, coef: str) -> Tensor:
    """The direction of the layer with the largest norm, a baseline of the paper (which does not spell it out)."""
    largest = norm.argmax(0)[None, ..., None].expand(1, *x.shape[1:])
    return x.gather(0, largest)[0]


def optimal(x: Tensor, norm: Tensor, t: float, coef: str) -> Tensor:
    """Least squared error over all directions, given the coefficient.

    norm: sum |x_l - |x_l| e|^2 is least for e ~ sum |x_l| x_l. projection: sum |x_l - (x_l . e) e|^2 is least for the leading
    eigenvector of sum x_l x_l^T, which lies in the span of the x_l: the weights are the leading eigenvector of their Gram matrix.
    """
    if coef == "norm" or x.shape[0] == 1:
        return (norm.unsqueeze(-1) * x).sum(0)
    scale = norm.amax(0).clamp_min(TINY)        # keeps squares inside fp32
    x = x / scale.unsqueeze(-1)
    if x.shape[0] == 2:
        a, b, c = x[0].square().sum(-1), x[1].square().sum(-1), (x[0] * x[1]).sum(-1)
        angle = 0.5 * torch.atan2(2 * c, a - b)
        return angle.cos().unsqueeze(-1) * x[0] + angle.sin().unsqueeze(-1) * x[1]
    gram = torch.einsum("i...d,j...d->...ij", x, x)
    for _ in range(12):                         # powers 2, 4, ... 4096: every column turns to the leading eigenvector
        gram = gram / gram.abs().amax((-1, -2), keepdim=True).clamp_min(TINY)
        gram = gram @ gram
    best = gram.diagonal(dim1=-2, dim2=-1).argmax(-1)[..., None, None].expand(*gram.shape[:-1], 1)
    return torch.einsum("...n,n...d->...d", gram.gather(-1, best).squeeze(-1), x)


RULES: dict[str, Callable[[Tensor, Tensor, float, str], Tensor]] = {
    "slerp": slerp, "mean": mean, "max-norm": max_norm, "optimal": optimal}


def merge(x: Tensor, rule: str, *, t: float, coef: str) -> tuple[Tensor, Tensor]:
    """x [n, ..., D] fp32 -> unit direction [..., D] and coefficients [n, ...], with x_l ~ coefficient_l * direction.

    coef "norm": |x_l|, the paper's (every layer keeps its length); "projection": x_l . direction, signed, the least error.
    """
    norm = length(x)
    direction = RULES[rule](x, norm, t, coef)
    direction = direction / length(direction).clamp_min(TINY).unsqueeze(-1)
    return direction, norm if coef == "norm" else (x * direction).sum(-1)


def distance(x: Tensor) -> Tensor:
    """x [n, ..., D] -> [...] in 0 .. 1: angle / pi between adjacent members, the largest of them (MiniCache section 4.2)."""
    u = x / length(x).clamp_min(TINY).unsqueeze(-1)
    return angle_between(u[:-1], u[1:]).amax(0) / torch.pi


def angle_between(u: Tensor, w: Tensor) -> Tensor:
    """Angle of unit vectors, 0 .. pi. arccos of their product has no digits left near 0 and pi; this form has.

    In fp64: the last bit of an fp32 atan2 depends on a vector's place in the tensor, and would decide between equally far tokens.
    """
    return (2 * torch.atan2(length(u - w).double(), length(u + w).double())).float()


def length(x: Tensor) -> Tensor:
    """Norm over the last dimension, safe from under- and overflow of the squares. x [..., D] -> [...]."""
    scale = x.abs().amax(-1, keepdim=True).clamp_min(TINY)
    return (x / scale).square().sum(-1).sqrt() * scale.squeeze(-1)
