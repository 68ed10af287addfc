"""The CPU form of `attend` and `commit`: C++, built once with the compiler that torch.compile needs, kept in the user's cache folder.

`load()` builds where needed, registers the form on the operators and says whether it is there; without a compiler it warns once, and the
reference stays in use. The instructions used follow torch's own choice for its CPU kernels (ATEN_CPU_CAPABILITY lowers both).
Trap: a C function takes bare pointers in the order of its struct Args; `attend_with` and `commit_with` are the only places that fill one.
"""
import ctypes
import functools
import hashlib
import os
import shlex
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from cache.kernels import library

SOURCES = [Path(__file__).with_name(name) for name in ("attend.cpp", "commit.cpp", "block.h")]
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}        # Type in block.h
RETENTION = {"topk": 0, "intended": 1, "literal": 2}                    # Retention in commit.cpp
COMPILER = "clang++" if sys.platform == "darwin" else "g++"             # torch.compile's own defaults


def build(capability: str) -> Path:
    """The shared library for an instruction set as torch.backends.cpu.get_cpu_capability() names it: AVX2 and up, or plain C++.

    RuntimeError with the compiler's last words, OSError where there is no compiler or no place to write.
    """
    command = [*shlex.split(os.environ.get("CXX", COMPILER)), "-std=c++17", "-O3", "-fno-math-errno", "-Wno-psabi", "-fPIC", "-shared"]
    command += ["-mavx2", "-mfma"] if capability.startswith("AVX") else []      # AVX-512 machines run the AVX2 code
    key = hashlib.sha256(repr((command, torch.__version__, [source.read_bytes() for source in SOURCES])).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minicache-engine"
    target = folder / f"kernels-{key}.so"
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as own:        # two processes may build at once: each renames a whole file into place
        made = Path(own) / target.name
        for openmp in (["-fopenmp"], []):                       # clang without its OpenMP runtime: one thread
            result = subprocess.run([*command, *openmp, *map(str, SOURCES[:2]), "-o", str(made)], capture_output=True, text=True)
            if result.returncode == 0:
                made.replace(target)
                return target
    raise RuntimeError(f"{command[0]} failed: {result.stderr.strip().rpartition(chr(10))[2]}")


def attend_with(function: Callable[[bytes], None]) -> Callable[..., tuple[Tensor, Tensor]]:
    """The operator's implementation on the C function of one build."""

    def attend(q: Tensor, q_rotated: Tensor, k: Tensor, v: Tensor, length: Tensor, k_stored: Tensor, v_stored: Tensor, k_magnitude: Tensor,
               v_magnitude: Tensor, exact: Tensor, k_retained: Tensor, v_retained: Tensor, retained_pos: Tensor, retained_score: Tensor,
               threshold: Tensor, k_window: Tensor, v_window: Tensor, k_levels: Tensor, v_levels: Tensor, index: int,
               sliding_window: int) -> tuple[Tensor, Tensor]:
        (B, H, D), (m, _, G, N, _), R, W = q.shape, k_stored.shape, k_retained.shape[3], k_window.shape[3]
        assert k.dtype == v.dtype == k_retained.dtype == k_window.dtype == q.dtype and q_rotated.dtype == torch.float32, "see SplitGroup"
        y, y_rotated = torch.empty(B, H, D), torch.empty(B, H, D)
        made = [x.contiguous() for x in (q, q_rotated, k, v, length, threshold)]        # what a step makes may be a view; buffers are whole
        q, q_rotated, k, v, length, threshold = made
        tensors = (q, q_rotated, k, v, length, k_stored, v_stored, k_magnitude, v_magnitude, exact, k_retained, v_retained, retained_pos,
                   retained_score, threshold, k_window, v_window, k_levels, v_levels, y, y_rotated)
        function(struct.pack(
            "37q", *[x.data_ptr() for x in tensors], B, H, G, D, N, R, W, *code_bits(D, k_stored, v_stored), m > 1, v_stored.shape[0] > 1,
            index, DTYPES[q.dtype], k_magnitude.dtype == torch.float16, sliding_window, torch.get_num_threads()))
        return y, y_rotated

    return attend


def commit_with(function: Callable[[bytes], None]) -> Callable[..., None]:
    """Likewise for `commit`."""

    def commit(k: Tensor, v: Tensor, length: Tensor, n_new: Tensor, k_direction: Tensor, v_direction: Tensor, k_magnitude: Tensor,
               v_magnitude: Tensor, exact: Tensor, k_retained: Tensor, v_retained: Tensor, retained_pos: Tensor, retained_score: Tensor,
               score_range: Tensor, overflow: Tensor, k_window: Tensor, v_window: Tensor, rotation: Tensor, k_levels: Tensor,
               v_levels: Tensor, rule: int, coef: str, t: float, retention: str, gamma: float, sinks: int) -> None:
        (n, B, G, _, D), N, R, W = k.shape, k_magnitude.shape[3], k_retained.shape[3], k_window.shape[3]
        assert k.dtype == v.dtype == k_retained.dtype == k_window.dtype and n <= 2, "see SplitGroup"
        k, v, length, n_new = k.contiguous(), v.contiguous(), length.contiguous(), n_new.contiguous()
        tensors = (k, v, length, n_new, k_direction, v_direction, k_magnitude, v_magnitude, exact, k_retained, v_retained, retained_pos,
                   retained_score, score_range, overflow, k_window, v_window, rotation, k_levels, v_levels)
        function(struct.pack(
            "38q2d", *[x.data_ptr() for x in tensors], n, B, G, D, N, R, W, *code_bits(D, k_direction, v_direction),
            k_direction.shape[0] == n, v_direction.shape[0] == n, DTYPES[k.dtype], k_magnitude.dtype == torch.float16, rule,
            coef == "projection", RETENTION[retention], sinks, torch.get_num_threads(), t, gamma))

    return commit


def code_bits(D: int, *stored: Tensor) -> list[int]:
    return [8 * x.shape[4] // D if x.dtype == torch.uint8 else 16 for x in stored]


@functools.cache
def load() -> bool:
    """Register the form for CPU tensors, once a process. False, with a warning on stderr, where it cannot be built."""
    try:
        path = build(torch.backends.cpu.get_cpu_capability())
        built = ctypes.CDLL(str(path))
        library.impl("attend", attend_with(built.attend), "CPU")
        library.impl("commit", commit_with(built.commit), "CPU")
    except (OSError, RuntimeError) as error:
        print(f"warning: the C++ kernels were not built ({error}), so the slower reference is used; install g++, name a compiler in CXX, "
              "or a writable folder in XDG_CACHE_HOME", file=sys.stderr)
        return False
    return True
