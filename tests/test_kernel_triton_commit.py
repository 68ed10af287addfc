"""The Triton form of `commit` against the reference, without a GPU: in Triton's interpreter, and compiled ahead for sm_80 and sm_90.

The stream, its comparison and the hard vectors are those of the C++ form. The interpreter must be chosen before triton is imported, so its
cases run in a child process, this file again with TRITON_INTERPRET=1; with CUDA they run for real instead.
Trap: the interpreter runs one thread, so what a barrier guards shows on a device only.
"""
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import test_kernel_commit
import torch
from test_kernel_commit import assert_like, run
from test_kernel_triton import BF16, DEVICE, FP16, FP32, INTERPRETED, interpreter_repairs, runs_kernels  # noqa: F401
from test_kernel_triton_ahead import compiled
from test_split import make, setting
from torch import Tensor

from cache import CacheConfig
from cache.kernels import triton_commit


def on_device(form: Callable) -> Callable:
    """A form of the operator, for buffers that stand on the CPU."""
    def run(*arguments):
        there = [x.to(DEVICE) if isinstance(x, Tensor) else x for x in arguments]
        out = form(*there)
        for mine, its in zip(arguments, there, strict=True):
            if mine is not its:
                mine.copy_(its)
        return out if out is None else out.cpu()
    return run


def apart(x: Tensor) -> Tensor:
    """x [n, B, G, T, D] as a step projects it: rows with others between them, NaN here."""
    return torch.cat([x * float("nan"), x, x * float("nan")], 2).split(x.shape[2], 2)[1]


def commit_a_step(k: Tensor, v: Tensor, length: Tensor, n_new: Tensor, *rest) -> None:
    """The operator as the compiled step calls it: one token a row or none, as a bool, and V where it was projected."""
    triton_commit.commit_triton(k, apart(v), length, n_new.bool(), *rest)


commit, store = on_device(commit_a_step), on_device(triton_commit.store_triton)


# head_dim, kv heads, dtype, seed, steps; in turn the rules, coefficients, widths, windows and ways to retain; 23 steps fill a row
CASES = {
    "window=5,sinks=2,retain=0.2,bits=4": (64, 1, BF16, 1, 12),
    "window=0,sinks=0,retain=0.1,coef=norm": (96, 1, BF16, 2, 23),
    "merge=slerp,coef=norm,retention=intended,gamma=0.3,retain=0.2,sinks=2,window=0,bits=3": (96, 1, FP16, 3, 12),
    "merge=mean,retention=literal,gamma=0.4,retain=0.2,window=3,k_bits=8,v_bits=2": (32, 1, FP32, 4, 12),
    "merge=max-norm,merge_k=0,window=1,retention=intended,gamma=0,retain=0.3,sinks=1,k_bits=4": (64, 1, FP32, 6, 23),
    "merge_v=0,window=16,retain=0.3,sinks=0,v_bits=3": (16, 2, BF16, 7, 12),
    "merge=slerp,t=0.3,retention=intended,gamma=0.9,sinks=1": (128, 1, FP32, 9, 23),
    "sinks=0,retain=0,window=2,v_bits=2": (256, 1, FP16, 8, 8),
    "quant,window=4,sinks=3,k_bits=8,v_bits=4": (128, 1, BF16, 9, 8),
    "quant,window=0,sinks=0,bits=3": (64, 1, FP16, 10, 23),
    "window=50,bits=4": (64, 1, FP32, 11, 8),
    "quant,window=2,sinks=1,k_bits=2,v_bits=3": (32, 6, FP16, 12, 8),                  # 18 (row, kv head)s: two blocks, one not full
    "window=3,sinks=1,retain=0.2,merge_k=0,k_bits=4,v_bits=2": (64, 11, BF16, 13, 8),     # 33: two of the blocks for many
}


@runs_kernels
@pytest.mark.parametrize("spec", CASES)
def test_triton_leaves_the_state_of_the_reference(spec: str, interpreter_repairs: None,  # noqa: F811
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a wrong plane, stride, rule, slot, flag or threshold; rows that are done; the last column; blocks that are not full."""
    D, G, dtype, seed, steps = CASES[spec]
    monkeypatch.setattr(test_kernel_commit, "STEPS", steps)
    monkeypatch.setattr(triton_commit, "FEW", 20)
    monkeypatch.setattr(triton_commit, "store_triton", store)
    shape = dict(D=D, G=G, dtype=dtype, seed=seed, form="triton")
    (want, length), (got, _) = (run(spec, fast, pytest.MonkeyPatch(), **shape) for fast in (None, commit))
    assert length[0] == 20 + steps
    assert_like(got, want, length, D, dtype)


@runs_kernels
@pytest.mark.parametrize("spec", CASES)
def test_triton_stores_a_prompt_as_the_reference(spec: str, interpreter_repairs: None,  # noqa: F811
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: tokens that leave from the ring or from the chunk itself, rows out of order, more tokens than a block, ends of short rows."""
    D, G, dtype, seed, _ = CASES[spec]
    monkeypatch.setattr(test_kernel_commit, "STEPS", 0)
    monkeypatch.setattr(triton_commit, "FEW", 100)
    monkeypatch.setattr(triton_commit, "store_triton", store)
    shape = dict(D=D, G=G, dtype=dtype, seed=seed, form="triton")
    (want, length), (got, _) = (run(spec, fast, pytest.MonkeyPatch(), **shape) for fast in (None, commit))
    assert_like(got, want, length, D, dtype)


@runs_kernels
@pytest.mark.parametrize("D,dtype", [(128, BF16), (80, FP32)])
def test_triton_writes_a_step_of_the_full_cache(D: int, dtype: torch.dtype, interpreter_repairs: None,  # noqa: F811
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: the cache as a window: a wrong row, head or column, the last one, a row that is done."""
    group = CacheConfig().build(n_layer=1, n_kv_head=3, head_dim=D, batch=4, max_seq_len=9, dtype=dtype, device="cpu").groups[0]
    valid = torch.tensor([True, False, True, True])
    k, v = torch.randn(2, 4, 3, 1, D).to(dtype)
    length = torch.tensor([0, 3, 8, 5])
    group.write(k, v, length[:, None], valid[:, None], None)
    want = group.k.clone(), group.v.clone()
    group.reset()
    monkeypatch.setattr(torch.ops.minicache, "commit", commit)
    group.write_fast(k, v, length, valid)
    assert torch.equal(group.k, want[0]) and torch.equal(group.v, want[1]) and want[0][2, :, 8].any()


@runs_kernels
@pytest.mark.parametrize("rule", ["slerp", "mean", "max-norm", "optimal"])
@pytest.mark.parametrize("coef", ["norm", "projection"])
def test_triton_on_vectors_that_break_formulas(rule: str, coef: str, interpreter_repairs: None,  # noqa: F811
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: zero, alike, opposed, huge and tiny layers: nothing that is not finite, and the reference's magnitudes."""
    monkeypatch.setattr(test_kernel_commit, "builds", lambda: [commit])
    test_kernel_commit.test_vectors_that_break_formulas(rule, coef, pytest.MonkeyPatch())


@pytest.mark.skipif(INTERPRETED or DEVICE == "cuda", reason="the cases run in this process")
def test_in_the_interpreter() -> None:
    """Guards: device code that no machine without a GPU would ever run."""
    command = [sys.executable, "-m", "pytest", "-x", "-n", "0", "-p", "no:cacheprovider", "-k", "test_triton_", __file__]
    environment, root = os.environ | {"TRITON_INTERPRET": "1"}, Path(__file__).parents[1]
    child = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
    assert child.returncode == 0 and f"{2 * len(CASES) + 10} passed" in child.stdout, child.stdout[-3000:] + child.stderr[-2000:]


@pytest.mark.skipif(INTERPRETED, reason="the interpreter does not compile")
@pytest.mark.parametrize("few", [2048, 0])
@pytest.mark.parametrize("capability,spec,D", [
    (80, "bits=4", 128), (90, "bits=4,merge=slerp,retention=intended", 128), (90, "bits=3,merge_k=0,window=0", 96),
    (80, "k_bits=8,v_bits=2,retention=literal", 256), (90, "k_bits=16,v_bits=4", 128), (90, "quant,bits=4", 64)])
def test_compiles_ahead_without_spills(capability: int, spec: str, D: int, few: int, record_property, tmp_path: Path,
                                       monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: what only the compiler refuses, and registers that spill to memory."""
    planned = []
    monkeypatch.setattr(triton_commit, "FEW", few)
    monkeypatch.setattr(torch.ops.minicache, "commit", lambda *arguments: planned.extend(triton_commit.launches(*arguments)))
    group = make(setting(spec), D=D, S=4096, dtype=BF16)
    group.form, new = "triton", torch.zeros(len(group.layers), 3, 2, 1, D, dtype=BF16)
    group.commit(new, new, torch.zeros(3, dtype=torch.int64), torch.ones(3, dtype=torch.bool))
    assert len(planned) == 2
    for kernel, _, arguments, options in planned:
        registers, stack, shared = compiled(kernel, arguments, options, capability, tmp_path)
        line = f"sm_{capability}, {spec}, D {D}, few {few}: {registers} registers, {stack} bytes spilled, {shared} bytes shared"
        record_property(kernel.__name__, line)
        print(kernel.__name__, line)
        most = {1: (80, 0), 4: (168, 16384), 8: (168, 65536)}[options["num_warps"]]       # 4 warps: three programs a multiprocessor
        assert stack == 0 and registers <= most[0] and shared <= most[1]
