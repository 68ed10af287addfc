"""The C++ form of `commit` against the reference: one ragged stream, a prompt, then token by token, and the same state at the end.

Equal means: positions, flags, window and retained vectors bit for bit; codes bit for bit but for coordinates within rounding of
a cut, which may fall to the neighbouring code; numbers to the last place of their type. The streams hold ties (alike and opposed layers,
right angles), where both forms are exact, so that positions decide in both. Trap: tokens at right angles, rotated, stand on cuts.
"""
import ctypes
import itertools
import random
import re
from collections.abc import Callable

import pytest
import torch
from test_split import make, members, setting, state, stream
from torch import Tensor

from cache.base import LayerGroup
from cache.codec import PLANES
from cache.kernels import cpp
from cache.merge import RULES

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
LAYOUTS = ("window=5,sinks=2,retain=0.2", "window=0,sinks=0,retain=0.1,coef=norm",
           "merge=slerp,coef=norm,retention=intended,gamma=0.3,window=0",
           "merge=mean,retention=literal,gamma=0.4,retain=0.2,window=3", "merge=max-norm,merge_k=0,window=1,retention=intended,gamma=0",
           "merge_v=0,window=16,retain=0.3,sinks=0", "merge=slerp,t=0.3,retention=intended,gamma=0.9,sinks=1", "sinks=0,retain=0,window=2",
           "quant,window=4,sinks=3", "quant,window=0,sinks=0", "window=50")
BITS = ((16, 16), (8, 8), (4, 4), (3, 3), (2, 2), (4, 2), (16, 3), (8, 16))
START, STEPS, S = torch.tensor([20, 3, 9]), 30, 43


def builds() -> list[Callable[..., None]]:
    """The operator on the library for this machine and on the one without special instructions."""
    if not cpp.load():
        pytest.skip("no C++ compiler: the reference is used")
    names = dict.fromkeys((cpp.capability(), "DEFAULT"))
    return [cpp.commit_with(ctypes.CDLL(str(cpp.build(name))).commit) for name in names]


def run(spec: str, fast: Callable[..., None] | None, monkeypatch: pytest.MonkeyPatch, *, D: int, G: int, dtype: torch.dtype,
        seed: int, form: str = "cpp") -> tuple[LayerGroup, Tensor]:
    """A group after a prompt, rows out of order, and STEPS decode steps with some rows done, one row to the last column: group, length."""
    config = setting(f"{spec},attend_form=reference")
    group, n = make(config, G=G, D=D, dtype=dtype), members(config)
    k, v = stream(n, S, seed=seed, G=G, D=D, total=None, dtype=dtype, right_angles=not group.codec)      # coded, they stand on cuts
    if fast is not None:
        monkeypatch.setattr(torch.ops.minicache, "commit", fast)
        group.form = form
        assert group.commits_fast
    length = START.clone()
    for rows in (torch.tensor([2, 0]), torch.tensor([1])):
        for a, b in ((0, 7), (7, 20)):
            group.commit(k[:, rows, :, a:b], v[:, rows, :, a:b], length[rows].clamp_max(a), (length[rows] - a).clamp(0, b - a), rows)
    group.overflow.zero_()      # the reference counts a piece by the range at its end, C++ each token by the range that it met
    g = torch.Generator().manual_seed(seed)
    for _ in range(STEPS):
        n_new = (torch.rand(3, generator=g) < torch.tensor([1.0, 0.5, 0.8])) & (length < S)
        at = length.clamp_max(S - 1)
        new_k, new_v = (torch.stack([x[:, b, :, at[b]] for b in range(3)], 1)[:, :, :, None] for x in (k, v))
        group.commit(new_k, new_v, length, n_new.long())
        length = length + n_new
    monkeypatch.undo()
    return group, length


def codes(packed: Tensor, bits: int, D: int) -> Tensor:
    """Packed codes [..., D * bits / 8] -> [..., D] int."""
    out, at, shift = 0, 0, 0
    for width in PLANES[bits]:
        plane = packed[..., at:at + D * width // 8].int()
        out = out | torch.cat([plane >> p & 2 ** width - 1 for p in range(0, 8, width)], -1) << shift
        at, shift = at + D * width // 8, shift + width
    return out


def assert_like(got: LayerGroup, want: LayerGroup, length: Tensor, D: int, dtype: torch.dtype) -> None:
    a, b = state(got, length), state(want, length)
    for name in (name for name in a if name in ("pos", "exact") or name.endswith(("_window", "_retained"))):
        assert torch.equal(a[name], b[name]), name
    assert torch.equal(got.overflow, want.overflow) and (not want.R or torch.equal(got.active().sum(-1), want.active().sum(-1)))
    torch.testing.assert_close(a["score"], b["score"], rtol=0, atol=5e-7)
    torch.testing.assert_close(a["range"], b["range"], rtol=0, atol=5e-7)
    last = {FP32: 1e-6, FP16: 2 ** -11, BF16: 2 ** -8}[dtype]       # half a step of a coordinate of 1
    for x in "kv":
        mine, yours = a[f"{x}_direction"], b[f"{x}_direction"]
        same = torch.ones(a[f"{x}_magnitude"].shape, dtype=torch.bool)
        if x in want.codec:
            bits = want.codec[x].bits
            mine, yours = codes(mine, bits, D), codes(yours, bits, D)
            assert (mine - yours).abs().amax() <= 1 and (mine != yours).float().mean() < 2e-4, f"{x} codes"
            same &= (mine == yours).all(-1)
        else:
            torch.testing.assert_close(mine, yours, rtol=last * 2, atol=1e-6)
        mine, yours = a[f"{x}_magnitude"][same], b[f"{x}_magnitude"][same]
        # two nearly equal eigenvalues: rounding turns the direction, and the projections with it
        torch.testing.assert_close(mine, yours, rtol=2e-6 if dtype == FP32 else 2 ** -10, atol=3e-5)


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("k_bits,v_bits", BITS)
def test_cpp_leaves_the_state_of_the_reference(k_bits: int, v_bits: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a wrong plane, stride, rule, slot, flag or threshold; rows that are done; the last column; both builds in turn."""
    pick = random.Random(f"{k_bits} {v_bits} {dtype}")
    for layout, form in zip(LAYOUTS, itertools.cycle(builds()), strict=False):
        D, shape = pick.choice((128, 64, 96, 256, 16)), dict(G=pick.choice((1, 2, 3)), dtype=dtype, seed=pick.randrange(100))
        spec = f"{layout},k_bits={k_bits},v_bits={v_bits}"
        (want, length), (got, _) = (run(spec, fast, monkeypatch, D=D, **shape) for fast in (None, form))
        assert length[0] == S
        try:
            assert_like(got, want, length, D, dtype)
        except AssertionError as error:
            raise AssertionError(f"{spec} D={D} {shape}: {error}") from None


@pytest.mark.parametrize("rule", ["slerp", "mean", "max-norm", "optimal"])
@pytest.mark.parametrize("coef", ["norm", "projection"])
def test_vectors_that_break_formulas(rule: str, coef: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: zero, alike, opposed, huge and tiny layers: nothing that is not finite, and the reference's magnitudes."""
    D, e = 8, torch.eye(8)
    pairs = [(0 * e[0], 0 * e[0]), (0 * e[0], e[1]), (e[2], 0 * e[2]), (e[3], e[3]), (e[4], -e[4]), (1e15 * e[5], 1e-10 * e[6]),
             (e[0], 2 * e[1]), (1e-10 * e[5], -1e15 * e[5]), (3e4 * e[1], 3e4 * e[1] + e[2])]
    x = torch.stack([torch.stack(p) for p in pairs], 1)[:, None, None]                   # [2, 1, 1, T, D]
    spec = f"merge={rule},coef={coef},window=0,sinks=0,retain=0.5,bits=16"
    for form in builds():
        got, want = (make(setting(f"{spec},attend_form=reference"), batch=1, G=1, D=D) for _ in range(2))
        want.commit(x, x, torch.tensor([0]), torch.tensor([len(pairs)]))
        monkeypatch.setattr(torch.ops.minicache, "commit", form)
        got.form = "cpp"
        for i in range(len(pairs)):
            got.commit(x[..., i:i + 1, :], x[..., i:i + 1, :], torch.tensor([i]), torch.tensor([1]))
        monkeypatch.undo()
        for name, buffer in got.named_buffers():
            assert not buffer.isnan().any(), name
        length = torch.tensor([len(pairs)])
        for name in ("pos", "score", "k_magnitude", "v_magnitude"):
            torch.testing.assert_close(state(got, length)[name], state(want, length)[name], rtol=1e-5, atol=1e-7)


def test_threads_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a race between heads, or scratch shared by threads; the size is one that threads take."""
    threads, form, results = torch.get_num_threads(), builds()[0], []
    k, v = torch.randn(2, 2, 4, 32, 8, 128, generator=torch.Generator().manual_seed(0))
    n_prompt, order = torch.tensor([7, 1, 0, 3]), torch.tensor([3, 0, 1, 2])
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            group = make(setting("bits=4,window=1,retain=0.2,attend_form=reference"), batch=4, G=32, D=128, S=8)
            monkeypatch.setattr(torch.ops.minicache, "commit", form)
            group.form = "cpp"
            group.commit(k[..., :7, :], v[..., :7, :], torch.zeros_like(n_prompt), n_prompt, order)
            group.commit(k[..., 7:, :], v[..., 7:, :], n_prompt[order.argsort()], torch.tensor([1, 1, 0, 1]))
            results.append([b.clone() for b in group.buffers()])
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, *results))


def test_what_the_operator_does_not_know_stays_with_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a user's own rule replaced by ours, also under the name of one of ours; angles over all heads; three layers."""
    monkeypatch.setitem(RULES, "mean", lambda x, norm, t, coef: x[-1])
    for spec, fast in (("merge=optimal", True), ("merge=mean", False), ("granularity=token", False), ("group=3", False), ("quant", True)):
        group = make(setting(spec))
        assert group.commits_fast is fast, spec
        if not fast:
            monkeypatch.setattr(group, "commit_fast", None)
        group.form = "cpp"
        new = torch.randn(2, len(group.layers), 3, 2, 1, 8)
        cpp.load() and group.commit(new[0], new[1], torch.tensor([20, 0, 17]), torch.tensor([1, 1, 0]))


def test_compiled_in_place() -> None:
    """Guards: a write that the schema hides, a graph break, a buffer copied first: nothing allocated has a column dimension."""
    from torch._inductor.utils import run_and_get_code
    builds()
    torch._dynamo.reset()
    spec, x = "bits=4,window=3,retain=0.2,retention=intended,gamma=0.3", torch.randn(2, 2, 3, 2, 1, 8)
    groups, length, n_new = [make(setting(spec)) for _ in range(2)], torch.tensor([20, 2, 30]), torch.tensor([1, 1, 0])
    _, code = run_and_get_code(torch.compile(groups[0].commit, fullgraph=True), x[0], x[1], length, n_new)
    groups[1].commit(x[0], x[1], length, n_new)
    assert all(map(torch.equal, groups[0].buffers(), groups[1].buffers())) and groups[1].k_direction.any()
    assert len(code) == 1 and "minicache.commit" in code[0]
    assert not [shape for shape in re.findall(r"empty_strided_cpu\(\(([\d, ]*)\)", code[0]) if str(S - 3) in re.findall(r"\d+", shape)]
    assert "copy_" not in code[0] and "clone" not in code[0]
    torch._dynamo.reset()
