"""The Triton form of `attend` against the reference, without a GPU: in Triton's interpreter. Compiled ahead: test_kernel_triton_ahead.py.

The interpreter must be chosen before triton is imported, so its cases run in a child process, this file again with TRITON_INTERPRET=1;
with CUDA they run for real instead. Trap: the interpreter has no inline assembly, truncates to bf16 and multiplies bf16 as integers:
`interpreter_repairs` makes that good.
"""
import heapq
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import test_kernel_cpp
import torch
from test_kernel_triton_codes import run_ptx
from torch import Tensor

from cache import CacheConfig, build_cache
from cache.base import Columns, LayerGroup, attend_columns
from cache.kernels import triton_attend

CUDA, INTERPRETED = torch.cuda.is_available(), os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if CUDA else "cpu"
runs_kernels = pytest.mark.skipif(not (CUDA or INTERPRETED), reason="no CUDA: runs in the interpreter, through test_in_the_interpreter")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
TOLERANCE = {FP32: 1e-5, FP16: 1e-3, BF16: 8e-3}        # of the largest output: what is no number in the kernel is rounded to the type once


# -- what the interpreter lacks -----------------------------------------------------------------------------------------------------
@pytest.fixture
def interpreter_repairs(monkeypatch: pytest.MonkeyPatch) -> None:
    if not INTERPRETED:
        return
    import triton.language as tl
    from triton.runtime import interpreter
    handle, patch_tensor, plain_cast = interpreter.TensorHandle, interpreter._patch_lang_tensor, interpreter.InterpreterBuilder.cast_impl

    def floats(x):
        return (x.data.astype(np.uint32) << 16).view(np.float32) if x.dtype.scalar == tl.bfloat16 else x.data.astype(
            np.int32 if x.dtype.scalar == tl.int8 else np.float32)

    def dot(self, a, b, d, precision, imprecise):
        return handle(np.matmul(floats(a), floats(b)) + d.data, d.dtype.scalar)

    def assembly(self, text, constraints, values, types, pure, pack):
        registers, shape = [], values[-1].data.shape
        for x in values:        # 32-bit elements take a register each, smaller ones share
            x = np.ascontiguousarray(x.data).reshape(-1, pack)
            registers += [np.ascontiguousarray(x.view(np.uint32)[:, i]) for i in range(x.itemsize * pack // 4)]
        width = types[0].scalar.primitive_bitwidth
        out = np.stack(run_ptx(text, constraints, registers), 1).reshape(-1, len(types), width * pack // 32)
        parts = [handle(np.ascontiguousarray(out[:, i]).view(f"int{width}").reshape(shape), types[i].scalar) for i in range(len(types))]
        return type("Result", (), {"get_result": lambda self, i: parts[i]})()

    def cast(self, x, to):
        if x.dtype.scalar != tl.float32 or to.scalar != tl.bfloat16:
            return plain_cast(self, x, to)
        bits = x.data.astype(np.float32).view(np.uint32)
        return handle(((bits + 0x7fff + (bits >> 16 & 1)) >> 16).astype(np.uint16), tl.bfloat16)

    def index(tensor, scope):       # numpy 2.4 makes no integer of an array with one element
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    for name, repaired in {"create_dot": dot, "create_inline_asm": assembly, "cast_impl": cast}.items():
        monkeypatch.setattr(interpreter.InterpreterBuilder, name, repaired)
    monkeypatch.setattr(interpreter, "_patch_lang_tensor", index)


# -- equal to the reference ---------------------------------------------------------------------------------------------------------
def filled(spec: str, *, heads: tuple[int, int], D: int, S: int, lengths: list[int], dtype: torch.dtype, sliding_window: int | None,
           ) -> tuple[LayerGroup, Tensor, Tensor, Tensor, Tensor]:
    """A group with random tokens stored in ragged rows, and a new token: group, q [n, B, H, D], k, v [n, B, G, D], length [B]."""
    config, (H, G), B = CacheConfig.parse(spec), heads, len(lengths)
    n = config.group if config.kind == "minicache" else 1
    group = build_cache(config, n_layer=n, n_kv_head=G, head_dim=D, batch=B, max_seq_len=S, dtype=dtype, device=DEVICE,
                        sliding_window=sliding_window).groups[0]
    g, length = torch.Generator().manual_seed(D + S), torch.tensor(lengths, device=DEVICE)
    k, v = torch.randn(2, n, B, G, S, D, generator=g).to(DEVICE, dtype)
    group.commit(k[..., :max(lengths), :], v[..., :max(lengths), :], torch.zeros_like(length), length)
    q = 2 * torch.randn(n, B, H, D, generator=g).to(DEVICE)
    return group, q.to(dtype), k[..., -1, :], v[..., -1, :], length


def arguments(group: LayerGroup, index: int, q: Tensor, k: Tensor, v: Tensor, length: Tensor) -> tuple:
    """What the operator takes, as of the C++ form; K and V with NaN around them."""
    amid = torch.full((2, k.numel() + 512), float("nan"), dtype=k.dtype, device=k.device)[:, 256:-256]      # what is read beside them tells
    k, v = (x.copy_(y.flatten()).view_as(y) for x, y in zip(amid, (k, v), strict=True))
    v = torch.cat([v * float("nan"), v, v * float("nan")], 1).split(v.shape[1], 1)[1]      # rows apart, as a step projects them
    return test_kernel_cpp.arguments(group, index, q, k, v, length)


@contextmanager
def levels_on_the_grid(group: LayerGroup, dtype: torch.dtype) -> Iterator[None]:
    """Within it the reference decodes codes of 16-bit models as the kernel does (GRID in triton_codes.py)."""
    from cache.kernels.triton_codes import GRID, MIDDLE, becomes_numbers
    codecs = getattr(group, "codec", {}).values()
    codecs = {id(c): c for c in codecs if becomes_numbers(c.bits, len(c.rotation), dtype)}.values()
    exact = [codec.levels.clone() for codec in codecs]
    for codec in codecs:
        numbers, step = GRID.value[codec.bits]
        codec.levels.copy_((torch.tensor(numbers) - MIDDLE.value) * step)
    yield
    for codec, levels in zip(codecs, exact, strict=True):
        codec.levels.copy_(levels)


def assert_equal(group: LayerGroup, q: Tensor, k: Tensor, v: Tensor, length: Tensor, attend=triton_attend.attend_triton) -> None:
    own = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=DEVICE)
    for i in range(len(q)):
        with levels_on_the_grid(group, q.dtype):
            columns = [*group.columns(i, length, length[:, None], None), Columns(k[i][:, :, None], v[i][:, :, None], own)]
            expected = attend_columns(q[i][:, :, None].float(), k.shape[2], columns)[:, :, 0]
        y = attend(*arguments(group, i, q[i], k[i], v[i], length))[:, :, 0]
        error = (y - expected).abs().amax((1, 2)) / expected.abs().amax((1, 2))
        assert (error < TOLERANCE[q.dtype]).all(), f"member {i}: {error.tolist()} of the largest output, by row"


CASES = {   # name: spec, (query heads, kv heads), head_dim, capacity, lengths, dtype, sliding window, programs a row at most
    "full bf16, GQA 4": ("full", (4, 1), 64, 150, [140, 0], BF16, None, 16),
    "full fp32, one program a row": ("full", (3, 1), 128, 70, [66, 31], FP32, None, 1),
    "full fp16, sliding": ("full", (2, 2), 96, 100, [99, 20], FP16, 30, 16),
    "16 bits, one program a row": ("quant,window=0,sinks=0", (4, 1), 64, 150, [140, 0], BF16, None, 1),
    "16 bits merged": ("minicache,merge_from=0", (4, 1), 128, 100, [97, 5], BF16, None, 16),
    "4 bits merged, GQA 4": ("minicache,merge_from=0,bits=4,retain=0.2", (4, 1), 64, 180, [175, 70], BF16, None, 16),
    "4 bits, many tiles a program": ("quant,bits=4,window=5", (4, 2), 64, 200, [190], FP16, None, 1),
    "4 bits fp32, GQA 1": ("quant,bits=4", (2, 2), 128, 60, [59, 0], FP32, None, 16),
    "4 bits, D 96, threshold": ("minicache,merge_from=0,bits=4,retention=intended,gamma=0.4,retain=0.3", (2, 2), 96, 150, [149],
                                BF16, None, 16),
    "3 bits, merged alone": ("minicache,merge_from=0,bits=3,window=0,sinks=0,retain=0", (4, 1), 128, 80, [75, 0], BF16, None, 16),
    "3 bits, D 96, sliding": ("minicache,merge_from=0,bits=3,retain=0.2", (2, 1), 96, 150, [140], BF16, 50, 16),
    "3 bits fp32": ("quant,bits=3", (2, 1), 64, 50, [45, 20], FP32, None, 16),
    "2 bits, window 1": ("quant,bits=2,window=1", (4, 1), 64, 80, [78, 1], FP16, None, 16),
    "K 8, V 2, three members": ("minicache,merge_from=0,group=3,k_bits=8,v_bits=2", (2, 1), 128, 80, [75], BF16, None, 16),
    "K 16, V 4": ("minicache,merge_from=0,v_bits=4", (2, 1), 128, 80, [75], BF16, None, 16),
    "K 4, V 8": ("quant,k_bits=4,v_bits=8", (2, 1), 64, 80, [75, 3], BF16, None, 16),
    "K own, K 4, V 16": ("minicache,merge_from=0,k_bits=4,merge_k=0", (2, 1), 64, 80, [75], BF16, None, 16),
    "window past the sliding one": ("quant,bits=4,window=32", (2, 1), 32, 150, [140, 100, 67, 31], BF16, 20, 16),
    "16 bits, window past the sliding one": ("quant,window=32", (2, 1), 32, 150, [140, 32], BF16, 20, 1),
    "4 bits, GQA 7": ("quant,bits=4,window=0,sinks=0", (7, 1), 64, 80, [79], BF16, None, 1),
    "2 bits, GQA 8": ("quant,bits=2", (16, 2), 128, 80, [75, 40], BF16, None, 2),
    "4 bits, D 256": ("quant,bits=4", (4, 2), 256, 80, [75], BF16, None, 16),
    "4 bits, fewer columns than a tile": ("quant,bits=4,window=1,sinks=0", (4, 1), 128, 20, [18, 0], BF16, None, 16),
    "4 bits, retained without a window": ("quant,bits=4,window=0,sinks=3", (2, 1), 64, 80, [75, 2], BF16, None, 16),
    "3 bits, D 16": ("minicache,merge_from=0,bits=3", (2, 1), 16, 60, [55], FP16, None, 16),
}


@runs_kernels
@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference(name: str, interpreter_repairs: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a wrong plane, mask, ring position, split or weight; every bit width, head_dim and dtype; rows that hold nothing."""
    spec, heads, D, S, lengths, dtype, sliding_window, most = CASES[name]
    monkeypatch.setattr(triton_attend, "choose_splits", lambda rows, tiles, exact_tiles, resident, few: (
        min(most, tiles), 0 if exact_tiles is None else max(1, min(most, exact_tiles))))
    inputs = filled(spec, heads=heads, D=D, S=S, lengths=lengths, dtype=dtype, sliding_window=sliding_window)
    assert_equal(*inputs)
    if dtype == BF16 and D in (64, 256):        # written by each of the three ways that the sums are combined
        *wide, _ = arguments(inputs[0], 0, *(x[0] for x in inputs[1:4]), inputs[4])
        assert torch.equal(triton_attend.attend_triton(*wide, BF16), triton_attend.attend_triton(*wide, FP32).to(BF16))


@pytest.mark.skipif(CUDA or INTERPRETED, reason="the cases run in this process")
def test_in_the_interpreter() -> None:
    """Guards: device code that no machine without a GPU would ever run."""
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "-k", "test_equals_the_reference", __file__]
    environment, root = os.environ | {"TRITON_INTERPRET": "1"}, Path(__file__).parents[1]
    child = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
    assert child.returncode == 0 and f"{len(CASES)} passed" in child.stdout, child.stdout[-3000:] + child.stderr[-2000:]


def test_splits_share_the_work_out() -> None:
    """Guards: a last round of few programs, programs of nothing, and exact columns that keep a row waiting, by a clock and a heap."""
    def time(rows: int, tiles: int, exact: int, resident: int, n: int, e: int) -> int:
        free = [0] * resident
        for cost in [-(-exact // e) + 1] * (rows * e) + [-(-tiles // n) + 2] * (rows * n):
            heapq.heapreplace(free, free[0] + cost)
        return max(free)

    for case in ((32, 64, 0, 264), (32, 63, 7, 264), (128, 63, 7, 264), (8, 64, 12, 528), (40, 9, 3, 77), (1, 1, 0, 1)):
        rows, tiles, exact, resident = case
        least = min(time(*case, n, max(1, -(-exact // -(-tiles // n)))) for n in range(1, tiles + 1))
        n, e = triton_attend.choose_splits(*case, 10 ** 6)
        assert time(*case, n, e) <= 1.05 * least and e <= max(1, exact), f"{case}: {n}, {e}"
    assert triton_attend.choose_splits(256, 256, 0, 2112, 16) == (8, 1) and triton_attend.choose_splits(38208, 15, 4, 2112, 16) == (1, 1)
    assert triton_attend.choose_splits(7680, 8, None, 528, 1) == (1, 0)         # no exact columns: nothing to combine
    assert sum(triton_attend.choose_splits(32, 16, 4, 2112, 16)) <= 16          # short rows: a launch would take longer


def test_load_says_whether_it_can() -> None:
    """Guards: an import error, or a form registered that cannot run, where there is no CUDA device."""
    assert triton_attend.load() is (CUDA and torch.cuda.get_device_capability() >= (8, 0))


@pytest.mark.skipif(not CUDA, reason="needs CUDA")
def test_replays_as_a_cuda_graph_for_any_length() -> None:
    """Guards: a sync or a length baked into the launch: one captured graph serves every filled length; and the registered operator."""
    assert triton_attend.load()
    group, q, k, v, length = filled("minicache,merge_from=0,bits=4", heads=(32, 8), D=128, S=2000, lengths=[1900, 1700], dtype=BF16,
                                    sliding_window=None)
    seen, step = length.clone(), torch.compile(lambda *x: torch.ops.minicache.attend(*x), fullgraph=True)
    inputs = arguments(group, 0, q[0], k[0], v[0], seen)
    step(*inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(*inputs)

    def replay(q, k, v, length, *rest):
        seen.copy_(length)
        graph.replay()
        return captured

    for now in (length, length - 1, length):        # the newest token forgotten: its column must not count
        assert_equal(group, q[:1], k[:1], v[:1], now, attend=replay)


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_the_grid_is_fine_beside_the_codes(bits: int) -> None:
    """Guards: a coarser grid for the levels of K and V than is paid for in quality."""
    outputs, length = [], torch.tensor([300, 200], device=DEVICE)
    for spec in ("quant,bits=16,window=0,sinks=0", f"quant,bits={bits},window=0,sinks=0"):
        group, q, *_ = filled(spec, heads=(8, 2), D=64, S=301, lengths=length.tolist(), dtype=BF16, sliding_window=None)
        outputs.append(attend_columns(q[0][:, :, None].float(), 2, list(group.columns(0, length, length[:, None], None))))
    with levels_on_the_grid(group, BF16):
        on_grid = attend_columns(q[0][:, :, None].float(), 2, list(group.columns(0, length, length[:, None], None)))
    exact, coded = outputs
    assert 0 < (on_grid - coded).square().mean() < 0.02 * (coded - exact).square().mean()
