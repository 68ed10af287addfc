"""The maths of merging, against its definitions: what each rule minimises, what it preserves, and the vectors that break formulas.

Everything is computed in fp32 as the cache does, and judged in fp64. Trap: near 0 and 180 degrees arccos has no digits left, so
the reference angle is taken from vectors that were built to have it.
"""
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cache.merge import RULES, distance, merge

COEFS = ("norm", "projection")
quick = settings(deadline=None, max_examples=30, derandomize=True)


def vectors(seed: int, n: int = 2, D: int = 16, count: int = 64) -> Tensor:
    """[n, count, D] fp32: from nearly parallel over independent to nearly anti-parallel, lengths over four orders of magnitude."""
    g = torch.Generator().manual_seed(seed)
    shared, own = torch.randn(count, D, generator=g), torch.randn(n, count, D, generator=g)
    sign = torch.randint(0, 2, (n, count, 1), generator=g) * 2 - 1
    mix = torch.rand(count, 1, generator=g)
    return (mix * sign * shared + (1 - mix) * own) * 10 ** (4 * torch.rand(n, count, 1, generator=g) - 2)


def pair(angle: Tensor, D: int = 8) -> Tensor:
    """Unit vectors [2, len(angle), D] fp32 at exactly these angles (fp64), in a plane that no axis lies in."""
    g = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(D, 2, generator=g, dtype=torch.float64)).Q
    a, b = basis[:, 0].expand(len(angle), D), angle.cos()[:, None] * basis[:, 0] + angle.sin()[:, None] * basis[:, 1]
    return torch.stack((a, b)).float()


def error(x: Tensor, rule: str, coef: str, t: float = 0.6) -> Tensor:
    """Squared error of restoring, relative to the squared length of all members, fp64 [...]."""
    direction, coefficient = merge(x, rule, t=t, coef=coef)
    x, restored = x.double(), coefficient.double()[..., None] * direction.double()
    return (x - restored).square().sum((0, -1)) / x.square().sum((0, -1))


@quick
@given(st.integers(0, 10 ** 6), st.sampled_from(list(RULES)), st.sampled_from(COEFS))
def test_direction_is_unit_and_norms_are_preserved(seed: int, rule: str, coef: str) -> None:
    """Guards: a direction that is not normalised, and a layer that is restored with another's length (the paper keeps each its own)."""
    x = vectors(seed)
    direction, coefficient = merge(x, rule, t=0.6, coef=coef)
    assert direction.shape == x.shape[1:] and coefficient.shape == x.shape[:-1]
    assert torch.allclose(direction.norm(dim=-1), torch.ones(()), atol=1e-5)
    restored = (coefficient[..., None] * direction).norm(dim=-1)
    if coef == "norm":
        assert torch.allclose(restored, x.norm(dim=-1), rtol=1e-5)
    else:
        assert (restored <= x.norm(dim=-1) * (1 + 1e-5)).all()


def test_slerp_ends_and_middle() -> None:
    """Guards: the swapped weights of the paper's Algorithm 2. t = 0 is the earlier layer, 1 the later, t moves by t of the angle."""
    x = vectors(1)
    unit = torch.nn.functional.normalize(x, dim=-1)
    for t, end in ((0.0, 0), (1.0, 1)):
        direction, _ = merge(x, "slerp", t=t, coef="norm")
        assert torch.allclose(direction, unit[end], atol=1e-4)
    angle = torch.tensor([0.01, 0.5, 1.5, 2.5, 3.0], dtype=torch.float64)
    x = pair(angle)
    direction, _ = merge(x, "slerp", t=0.6, coef="norm")
    for member, share in ((x[0], 0.6), (x[1], 0.4)):
        assert torch.allclose((direction.double() * member).sum(-1), (share * angle).cos(), atol=1e-4)


@quick
@given(st.integers(0, 10 ** 6), st.floats(0, 1), st.sampled_from(COEFS))
def test_optimal_is_never_worse_for_pairs(seed: int, t: float, coef: str) -> None:
    """Guards: a wrong sign or root in the closed form. No slerp at any t, mean or max-norm beats it under the same coefficient."""
    x = vectors(seed)
    best = error(x, "optimal", coef)
    for rule in ("slerp", "mean", "max-norm"):
        assert (best <= error(x, rule, coef, t) + 1e-5).all(), rule


@quick
@given(st.integers(0, 10 ** 6), st.integers(2, 8))
def test_optimal_projection_captures_the_leading_eigenvalue(seed: int, n: int) -> None:
    """Guards: power iteration that stops early or on a wrong column: sum (x . e)^2 is lambda_1 of sum x x^T (eigh, fp64)."""
    x = vectors(seed, n)
    _, coefficient = merge(x, "optimal", t=0.0, coef="projection")
    gram = torch.einsum("icd,jcd->cij", x.double(), x.double())
    leading = torch.linalg.eigh(gram).eigenvalues[:, -1]
    assert torch.allclose(coefficient.double().square().sum(0), leading, rtol=1e-4)


@quick
@given(st.integers(0, 10 ** 6), st.integers(2, 5))
def test_optimal_norm_is_the_best_direction(seed: int, n: int) -> None:
    """Guards: the other closed form, e ~ sum |x| x: no direction nearby and no other rule has less error with lengths kept."""
    x = vectors(seed, n)
    direction, coefficient = merge(x, "optimal", t=0.0, coef="norm")

    def loss(e: Tensor) -> Tensor:
        return (x.double() - coefficient.double()[..., None] * e.double()).square().sum((0, -1)) / x.double().square().sum((0, -1))

    g = torch.Generator().manual_seed(seed)
    for size in (1e-2, 0.3, 3.0):
        other = torch.nn.functional.normalize(direction + size * torch.randn(direction.shape, generator=g), dim=-1)
        assert (loss(direction) <= loss(other) + 1e-5).all()
    assert all((loss(direction) <= error(x, rule, "norm") + 1e-5).all() for rule in ("mean", "max-norm"))


def test_a_signed_coefficient_serves_pairs_past_90_degrees() -> None:
    """Guards: coefficients that lost their sign. With a norm one layer of a wide pair points the wrong way; with a projection none does."""
    x = pair(torch.tensor([1.8, 2.4, 3.0, math.pi], dtype=torch.float64))
    direction, coefficient = merge(x, "optimal", t=0.0, coef="projection")
    assert (coefficient[0] * coefficient[1] < 0).all()
    assert ((coefficient[..., None] * direction * x).sum(-1) > 0).all()
    assert (error(x, "optimal", "projection") < 0.5).all() and error(x, "optimal", "projection")[-1] < 1e-6
    assert (error(x, "slerp", "norm") > error(x, "optimal", "projection")).all()


def test_identical_layers_lose_nothing() -> None:
    """Guards: the parallel limit of every rule, where sin(angle) is zero: direction times coefficient gives the vector back."""
    x = vectors(2)[:1].expand(2, -1, -1)
    for rule in RULES:
        for coef in COEFS:
            assert (error(x, rule, coef) < 1e-10).all(), (rule, coef)


@pytest.mark.parametrize("rule, n", [("slerp", 2)] + [(rule, n) for rule in RULES if rule != "slerp" for n in (2, 3)])
@pytest.mark.parametrize("coef", COEFS)
def test_degenerate_vectors_stay_finite(rule: str, coef: str, n: int) -> None:
    """Guards: 0 / 0, sin(angle) = 0, and squares that leave fp32 for lengths of 1e-30 and 1e18; no direction is longer than one."""
    v, w, zero = torch.randn(2, 128, generator=torch.Generator().manual_seed(3)).unbind() + (torch.zeros(128),)
    base = [(zero, zero), (v, zero), (zero, v), (v, v), (v, -v), (v, 3 * v), (-v, 2 * v), (v, w), (v, v + 1e-7 * w), (v, -v + 1e-7 * w)]
    cases = [(a * s, b * r) for a, b in base for s in (1, 1e-30, 1e-20, 1e18) for r in (1, 1e-30, 1e-20, 1e18)]
    x = torch.stack([torch.stack([(a, b)[i % 2] for i in range(n)]) for a, b in cases], 1)       # [n, cases, 128]
    direction, coefficient = merge(x, rule, t=0.6, coef=coef)
    assert direction.isfinite().all() and coefficient.isfinite().all() and distance(x).isfinite().all()
    assert (direction.norm(dim=-1) < 1 + 1e-5).all()
    assert (coefficient.abs() <= x.double().norm(dim=-1) * (1 + 1e-5)).all()


def test_distance_is_right_at_the_ends() -> None:
    """Guards: arccos, which calls all angles below 3e-4 zero: 1e-3 to 1e-6 from 0 and from pi are told apart, in order."""
    small = torch.tensor([1e-3, 1e-4, 1e-5, 1e-6], dtype=torch.float64)
    assert torch.allclose(distance(pair(small)).double() * math.pi, small, rtol=0.1, atol=0)
    near_pi = distance(pair(math.pi - small)).double() * math.pi
    assert torch.allclose(near_pi, math.pi - small, rtol=0, atol=3e-7) and (near_pi <= math.pi + 3e-7).all()
    v = vectors(4)[0]
    assert (distance(torch.stack((v, v))) == 0).all()
    assert torch.allclose(distance(torch.stack((v, -v))), torch.ones(()))


@quick
@given(st.integers(0, 10 ** 6), st.integers(2, 5))
def test_distance_is_the_largest_angle_of_adjacent_members(seed: int, n: int) -> None:
    """Guards: the definition d = arccos(cosine) / pi, largest of adjacent members, whatever the lengths; away from the ends."""
    x = vectors(seed, n)
    u = torch.nn.functional.normalize(x.double(), dim=-1)
    expected = (u[:-1] * u[1:]).sum(-1).clamp(-1, 1).arccos().amax(0) / math.pi
    assert torch.allclose(distance(x).double(), expected, atol=1e-4)


def test_distance_does_not_depend_on_its_place() -> None:
    """Guards: commit being associative for equal tokens. A vector register and the tail after it may round atan2 differently in fp32."""
    x = vectors(5, count=61)
    whole = distance(x)
    for size in (1, 3, 8, 17, 40):
        assert torch.equal(torch.cat([distance(part) for part in x.split(size, 1)]), whole), f"in pieces of {size}"
