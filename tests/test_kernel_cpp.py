"""The C++ form of `attend` against the reference, on groups whose state was committed by the reference: every build that runs here.

What no query may see is poisoned with NaN first: a read past the length, of an unwritten slot or of the spare column shows everywhere.
"""
import ctypes
import itertools
import os
import random
import stat
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cache import CacheConfig, build_cache
from cache.base import Columns, LayerGroup, attend_columns
from cache.kernels import cpp

Attend = Callable[..., Tensor]
LENGTHS = torch.tensor([0, 3, 71, 139])
LAYOUTS = ("minicache,merge_from=0,window=5,sinks=2,retain=0.1", "quant,window=16,sinks=4", "quant,window=0,sinks=0",
           "minicache,merge_from=0,group=3,merge_k=0,window=0,retention=intended,gamma=0.3,retain=0.05",
           "minicache,merge_from=0,window=200,sinks=0,retain=0", "minicache,merge_from=0,window=3,merge_v=0,retain=0.3")
HEADS = ((2, 2), (4, 2), (3, 1), (8, 2), (8, 1), (13, 1), (10, 2))
DIMS = (128, 64, 96, 256, 80, 8)
BITS = ((16, 16), (8, 8), (4, 4), (3, 3), (2, 2), (4, 2), (16, 3), (3, 16), (8, 4))


@pytest.fixture(scope="module")
def builds() -> list[Attend]:
    """The operator on the library for this machine, on the AVX2 one where it runs, and on the one without special instructions."""
    if not cpp.load():
        pytest.skip("no C++ compiler: the reference is used")
    names = dict.fromkeys((cpp.capability(), "AVX2" if cpp.capability().startswith("AVX") else "DEFAULT", "DEFAULT"))
    return [cpp.attend_with(ctypes.CDLL(str(cpp.build(name))).attend) for name in names]


def make(spec: str, *, G: int, D: int, dtype: torch.dtype, S: int = 140, lengths: Tensor = LENGTHS, sliding: int | None = None,
         seed: int = 0) -> LayerGroup:
    """A group with `lengths` random tokens a row, and NaN wherever nothing was stored."""
    config = CacheConfig.parse(spec)
    n, B = config.group if config.kind == "minicache" else 1, len(lengths)
    g = torch.Generator().manual_seed(seed)
    group = build_cache(config, n_layer=n, n_kv_head=G, head_dim=D, batch=B, max_seq_len=S, dtype=dtype, device="cpu",
                        sliding_window=sliding).groups[0]
    mix = torch.rand(1, B, G, 1, 1, generator=g)
    k, v = (mix * torch.randn(1, B, G, S, D, generator=g) + torch.randn(n, B, G, S, D, generator=g) for _ in range(2))
    group.commit(k.to(dtype), v.to(dtype), torch.zeros(B, dtype=torch.long), lengths)
    if spec == "full":
        stored = (torch.arange(S) < lengths[:, None])[:, None, :, None]
        group.k.masked_fill_(~stored, torch.nan), group.v.masked_fill_(~stored, torch.nan)
        return group
    merged = (torch.arange(group.k_magnitude.shape[3]) < (lengths - group.W)[:, None])[:, None]
    filled = group.retained_score > -torch.inf
    parts = ("direction", "magnitude", "retained", "window")
    for x in "kv":
        direction, magnitude, retained, window = (getattr(group, f"{x}_{part}") for part in parts)
        magnitude.masked_fill_(~merged, torch.nan)
        direction.masked_fill_(~merged[..., None], 255 if direction.dtype == torch.uint8 else torch.nan)
        retained.masked_fill_(~filled[..., None], torch.nan)
        window.masked_fill_((group.ring_pos(lengths) < 0)[:, None, :, None], torch.nan)
    return group


def arguments(group: LayerGroup, index: int, q: Tensor, k: Tensor, v: Tensor, length: Tensor) -> tuple:
    """What the operator takes, from a group; q [B, H, D], k, v [B, G, D]."""
    sliding = group.sliding_window or 0
    q, k, v = (x[:, :, None] for x in (q, k, v))
    if hasattr(group, "k"):
        return (q, k, v, length, q.new_empty(0), *group.as_split(window=False), 0, sliding, torch.float32)
    least = group.threshold(group.score_range) if group.by_threshold else q.new_empty(0)
    return (q, k, v, length, least, *group._buffers.values(), index, sliding, torch.float32)


def attend(form: Attend, group: LayerGroup, index: int, q: Tensor, k: Tensor, v: Tensor, length: Tensor) -> Tensor:
    return form(*arguments(group, index, q, k, v, length))[:, :, 0]


def clean(group: LayerGroup) -> None:
    """The poison taken out: the reference multiplies what it masks by zero."""
    for buffer in group.buffers():
        if buffer.is_floating_point() and buffer.numel() and buffer is not group.score_range:
            buffer.nan_to_num_(nan=0.0, neginf=-torch.inf)


def reference(group: LayerGroup, index: int, q: Tensor, k: Tensor, v: Tensor, length: Tensor) -> Tensor:
    new = Columns(k[:, :, None], v[:, :, None], torch.ones(len(length), 1, 1, 1, dtype=torch.bool))
    return attend_columns(q[:, :, None].float(), k.shape[1], [*group.columns(index, length, length[:, None], None), new])[:, :, 0]


def reference_in_bytes(group: LayerGroup, index: int, q: Tensor, k: Tensor, v: Tensor, length: Tensor) -> Tensor:
    """The reference with what the form rounds where K is codes of a 16-bit model: levels to a grid of 7 bits, queries to 8 bits."""
    heads, levels = q.shape[1] // k.shape[1], group.codec["k"].levels
    exact, columns = levels.clone(), list(group.columns(index, length, length[:, None], None))
    steps = [levels.abs().max() / n for n in range(63, 47, -1)]
    step = min(steps, key=lambda step: float((levels - step * (levels / step).round()).square().sum()))
    levels.copy_(step * (levels / step).round())
    columns = [old._replace(k=new.k) for old, new in zip(columns, group.columns(index, length, length[:, None], None), strict=True)]
    levels.copy_(exact)
    scores, values = [], []
    for c in [*columns, Columns(k[:, :, None], v[:, :, None], torch.ones(len(length), 1, 1, 1, dtype=torch.bool))]:
        seen, unit = q.float() if c.k_rotation is None else q.float() @ c.k_rotation, 1.
        if c.k_rotation is not None:
            unit = seen.abs().amax(-1, keepdim=True).clamp_min(1e-30) / 127
            seen = (seen / unit).round()
        score = torch.einsum("bhd,bhnd->bhn", seen, c.k.float().repeat_interleave(heads, 1)) * unit * q.shape[-1] ** -0.5
        if c.k_scale is not None:
            score = score * c.k_scale.float().repeat_interleave(heads, 1)
        mask = c.mask[:, :, 0].expand(len(length), k.shape[1], -1).repeat_interleave(heads, 1)
        scores.append(score.masked_fill(~mask, -torch.inf))
        value = c.v.float() if c.v_scale is None else c.v.float() * c.v_scale.float()[..., None]
        values.append((value if c.v_rotation is None else value @ c.v_rotation.mT).repeat_interleave(heads, 1))
    return torch.einsum("bhn,bhnd->bhd", torch.cat(scores, -1).softmax(-1), torch.cat(values, 2))


def query(H: int, G: int, D: int, dtype: torch.dtype, B: int = len(LENGTHS), seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(B, heads, D, generator=g).to(dtype) for heads in (H, G, G))


def query_off_ties(group: LayerGroup, H: int, G: int, D: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """`query`, of which no rotated coordinate lies halfway between two bytes, where builds may round either way."""
    for seed in itertools.count(1):
        q, k, v = query(H, G, D, dtype, seed=seed)
        rotated = q.float() @ group.rotation("k")
        steps = 127 * rotated / rotated.abs().amax(-1, keepdim=True)
        if (steps - steps.floor() - 0.5).abs().min() > 1e-4:
            return q, k, v


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("k_bits,v_bits", BITS)
def test_equals_reference(builds: list[Attend], k_bits: int, v_bits: int, dtype: torch.dtype) -> None:
    """Guards: a wrong plane, table, stride or index; masks, ring and thresholds; rows of length 0; reads of what is not there."""
    pick = random.Random(f"{k_bits} {v_bits} {dtype}").choice
    for _ in range(8):
        layout, (H, G), D, sliding = pick(LAYOUTS), pick(HEADS), pick(DIMS), pick((None, 13, 64))
        group = make(f"{layout},k_bits={k_bits},v_bits={v_bits}", G=G, D=D, dtype=dtype, sliding=sliding)
        in_bytes = k_bits <= 4 and dtype != torch.float32
        asked = query_off_ties(group, H, G, D, dtype) if in_bytes else query(H, G, D, dtype)
        inputs = [(index, *asked, LENGTHS) for index in range(len(group.layers))]
        found = [[attend(form, group, *x) for x in inputs] for form in builds]
        clean(group)
        wanted = [(reference_in_bytes if in_bytes else reference)(group, *x) for x in inputs]
        for form in found:      # codes of 16-bit models: integer arithmetic, half a step of bf16 at most
            torch.testing.assert_close(torch.stack(form), torch.stack(wanted), rtol=0, atol=1e-5 if dtype == torch.float32 else 2e-3,
                                       msg=lambda text, at=(layout, H, G, D, sliding): f"{at}: {text}")


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_rounding_in_8_bits_is_small_beside_the_codes_own(builds: list[Attend], bits: int) -> None:
    """Guards: a coarser grid for the levels or the queries than is paid for in quality."""
    lengths = torch.tensor([300, 200])
    (q, k, v), results = query(8, 2, 64, torch.bfloat16, B=2), []
    for k_bits in (16, bits):
        group = make(f"quant,k_bits={k_bits},v_bits=16,window=0,sinks=0", G=2, D=64, dtype=torch.bfloat16, S=301, lengths=lengths)
        found = [attend(form, group, 0, 2 * q, k, v, lengths) for form in builds]
        clean(group)
        results.append(reference(group, 0, 2 * q, k, v, lengths))
    exact, coded = results
    for y in found:
        assert (y - coded).square().mean() < 0.02 * (coded - exact).square().mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_full_cache_equals_sdpa(builds: list[Attend], dtype: torch.dtype) -> None:
    """Guards: the form without magnitudes, window and retained slots, over more than one task of columns."""
    lengths = torch.tensor([0, 1, 513, 2200])
    for H, G, D in ((4, 4, 64), (8, 2, 96), (5, 1, 20)):
        group = make("full", G=G, D=D, dtype=dtype, S=2201, lengths=lengths)
        q, k, v = query(H, G, D, dtype)
        for form in builds:
            y = attend(form, group, 0, q, k, v, lengths)
            for b, n in enumerate(lengths):
                keys, values = (torch.cat((x[b, :, :n], new[b, :, None]), 1).float() for x, new in ((group.k, k), (group.v, v)))
                wanted = F.scaled_dot_product_attention(q[b, :, None].float(), keys, values, enable_gqa=True)[:, 0]
                torch.testing.assert_close(y[b], wanted, rtol=0, atol=1e-5)


def test_sharp_and_huge_scores_stay_exact(builds: list[Attend]) -> None:
    """Guards: overflow of exp or of int16 sums, and a running maximum that lags, when one score stands far above the rest."""
    for dtype, bits in itertools.product((torch.float32, torch.bfloat16), (16, 4)):
        group = make(f"minicache,merge_from=0,window=7,retain=0.05,k_bits={bits},v_bits={bits}", G=2, D=128, dtype=dtype)
        for buffer in (group.k_magnitude, group.k_retained, group.k_window):
            buffer.mul_(30)
        inputs = (1, *query(4, 2, 128, dtype), LENGTHS)
        found = [attend(form, group, *inputs) for form in builds]
        clean(group)
        wanted = (reference_in_bytes if bits == 4 and dtype == torch.bfloat16 else reference)(group, *inputs)
        for y in found:
            torch.testing.assert_close(y, wanted, rtol=0, atol=1e-4 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_integer_sums_do_not_overflow(builds: list[Attend], bits: int) -> None:
    """Guards: the integer arithmetic of 16-bit models at its bounds: every code at an end of the table, every query coordinate the same."""
    for D, code in itertools.product((64, 256), (0, 255)):
        lengths = torch.tensor([77, 140])
        group = make(f"quant,window=0,sinks=0,bits={bits}", G=1, D=D, dtype=torch.bfloat16, S=141, lengths=lengths)
        _, k, v = query(2, 1, D, torch.bfloat16, B=2)
        rotation = group.rotation("k")
        q = (torch.ones(2, 2, D) @ rotation.mT).bfloat16()      # all ones when rotated: sums of +-1 / sqrt(D), exact
        inputs = arguments(group, 0, q, k * 0, v, lengths)
        for x in "kv":
            getattr(group, f"{x}_direction").fill_(code)
            getattr(group, f"{x}_magnitude").fill_(2 ** -5)
        level = group.codec["k"].levels[-1 if code else 0].double() * 2 ** -5
        many = lengths * (level * D ** 0.5).exp()       # against 1 for the new token, whose score is 0
        for form in builds:
            y = (form(*inputs)[:, :, 0] @ rotation).double()
            wanted = (many[:, None, None] * level + (v.float() @ rotation)) / (1 + many)[:, None, None]
            torch.testing.assert_close(y, wanted.expand(y.shape), rtol=1e-3, atol=1e-4)


def test_result_depends_on_the_row_alone(builds: list[Attend]) -> None:
    """Guards: a split of the work by threads, rows or their lengths, which would change the last digits of a neighbour's text."""
    lengths, threads = torch.tensor([1300, 700, 40]), torch.get_num_threads()
    spec = "minicache,merge_from=0,window=4,retain=0.02,bits=4"
    group, (q, k, v) = make(spec, G=2, D=64, dtype=torch.float32, S=1310, lengths=lengths), query(4, 2, 64, torch.float32, B=3)
    try:
        torch.set_num_threads(1)
        one = attend(builds[0], group, 1, q, k, v, lengths)
        torch.set_num_threads(3)
        assert torch.equal(one, attend(builds[0], group, 1, q, k, v, lengths))
    finally:
        torch.set_num_threads(threads)
    for b in range(3):
        state = {name: x[:, b:b + 1] if name[1:2] == "_" else x[b:b + 1] for name, x in group.named_buffers(recurse=False)
                 if name not in ("code_rotation", "k_levels", "v_levels")}
        alone = make(spec, G=2, D=64, dtype=torch.float32, S=1310, lengths=lengths[b:b + 1])
        for name, x in state.items():
            getattr(alone, name).copy_(x)
        row = slice(b, b + 1)
        torch.testing.assert_close(attend(builds[0], alone, 1, q[row], k[row], v[row], lengths[row]), one[row], rtol=0, atol=1e-6)


def test_operator_is_registered_as_torch_wants_it(builds: list[Attend]) -> None:
    """Guards: a schema that hides a write or an alias, a fake form with other shapes, a break or a wrong result under fullgraph."""
    torch._dynamo.reset()
    group = make(LAYOUTS[0] + ",bits=4", G=2, D=16, dtype=torch.bfloat16, lengths=torch.tensor([9, 50]))
    clean(group)
    inputs = arguments(group, 0, *query(4, 2, 16, torch.bfloat16, B=2), torch.tensor([9, 50]))
    for dtype in (torch.float32, torch.bfloat16):
        torch.library.opcheck(torch.ops.minicache.attend.default, (*inputs[:-1], dtype))

    def step(*inputs) -> Tensor:    # q, k, v as views, as a model's projections give them
        q, k, v, *rest = inputs
        twist = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v)]
        return torch.ops.minicache.attend(*twist, *rest) * 2

    torch.testing.assert_close(torch.compile(step, fullgraph=True)(*inputs), builds[0](*inputs) * 2)
    torch._dynamo.reset()


def test_without_a_compiler_one_warning(monkeypatch: pytest.MonkeyPatch, tmp_path, capsys: pytest.CaptureFixture) -> None:
    """Guards: a traceback, or silence, where nothing can be compiled or written."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for compiler in ("no-such-compiler", "false"):
        monkeypatch.setenv("CXX", compiler)
        assert cpp.load.__wrapped__() is False
        out, err = capsys.readouterr()
        assert not out and err.count("\n") == 1 and compiler in err and "CXX" in err


def test_built_once(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    """Guards: a build in every process, half-written libraries and folders left behind; other flags must not find the same file."""
    compiler = tmp_path / "compiler"
    compiler.write_text('#!/bin/sh\necho run >> "$0.log"\nfor last; do :; done\necho library > "$last"\n')
    compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "kept"))
    first = cpp.build("AVX2")
    assert cpp.build("AVX2") == first and cpp.build("DEFAULT") != first and first.read_text() == "library\n"
    assert (tmp_path / "compiler.log").read_text().count("run") == 2 and len(os.listdir(first.parent)) == 2
