"""The CPU form of `attend` and `commit`: C++, built once with the compiler that torch.compile needs, kept in the user's cache folder.

`load()` builds where needed, registers the form on the operators and says whether it is there; without a compiler it warns once, and the
reference stays in use. The instructions used follow torch's own choice for its CPU kernels (ATEN_CPU_CAPABILITY lowers both).
Trap: a C function takes bare pointers in the order of its struct Args; `attend_with`, `commit_with` and `state` alone fill one.
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
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from cache.kernels import library

SOURCES = [Path(__file__).with_name(name) for name in ("attend.cpp", "commit.cpp", "block.h", "vector.h")]
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}        # Type in block.h
RETENTION = {"topk": 0, "intended": 1, "literal": 2}                    # Retention in commit.cpp
COMPILER = "clang++" if sys.platform == "darwin" else "g++"             # torch.compile's own defaults
AVX2 = ["-mavx2", "-mfma"]
FLAGS = {"AVX2": AVX2, "AVX512": AVX2, "AVX512 VNNI": [*AVX2, "-mavx512bw", "-mavx512vl", "-mavx512vnni", "-mprefer-vector-width=256"]}


def capability() -> str:
    """The instruction set as torch.backends.cpu.get_cpu_capability() names it, and whether AVX-512 comes with VNNI."""
    name = torch.backends.cpu.get_cpu_capability()
    known = getattr(torch.cpu, "get_capabilities", dict)()      # torch 2.11 has none
    return f"{name} VNNI" if name == "AVX512" and known.get("avx512_vnni") else name


def build(capability: str) -> Path:
    """The shared library for one of FLAGS, or plain C++.

    RuntimeError with the compiler's last words, OSError where there is no compiler or no place to write.
    """
    command = [*shlex.split(os.environ.get("CXX", COMPILER)), "-std=c++17", "-O3", "-fno-math-errno", "-Wno-psabi", "-fPIC", "-shared"]
    command += FLAGS.get(capability, [])
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


def attend_with(function: Callable[[bytes], None]) -> Callable[..., Tensor]:
    """The operator's implementation on the C function of one build."""

    def attend(q: Tensor, k: Tensor, v: Tensor, length: Tensor, threshold: Tensor, *rest) -> Tensor:
        *buffers, index, sliding_window, dtype = rest
        assert q.dtype == k.dtype == v.dtype == buffers[5].dtype and threshold.is_contiguous(), "see SplitGroup"
        y, made = torch.empty(q.shape), [x.contiguous() for x in (q, k, v, length)]     # what a step makes may be a view; buffers are whole
        function(struct.pack("38q", *state(buffers), *[x.data_ptr() for x in (*made, threshold, y)], q.shape[0], q.shape[1], index,
                             sliding_window, torch.get_num_threads()))
        return y.to(dtype)

    return attend


def commit_with(function: Callable[[bytes], None]) -> Callable[..., None]:
    """Likewise for `commit`."""

    def commit(k: Tensor, v: Tensor, length: Tensor, n_new: Tensor, rows: Tensor | None, *rest: Tensor | int | float | str) -> None:
        *buffers, rule, coef, t, retention, gamma, sinks = rest
        rows = length.new_empty(0) if rows is None else rows        # no elements: a null pointer
        (n, B, _, T, _), slots = k.shape, buffers[0].shape[1]
        assert k.dtype == v.dtype == buffers[5].dtype and rows.dtype == torch.int64 and n <= 2, "see SplitGroup"
        made = [x.contiguous() for x in (k, v, length, n_new.long(), rows)]
        function(struct.pack("41q2d", *state(buffers), *[x.data_ptr() for x in made], n, B, T, slots, rule, coef == "projection",
                             RETENTION[retention], sinks, torch.get_num_threads(), t, gamma))

    return commit


def state(buffers: Sequence[Tensor]) -> list[int]:
    """struct State in block.h: where the buffers of a group lie and what follows from their shapes."""
    k, v, magnitude, retained, window = (buffers[i] for i in (0, 1, 2, 5, 11))
    (m, _, G, N, _), R, D = k.shape, *retained.shape[3:]
    bits = [8 * x.shape[4] // D if x.dtype == torch.uint8 else 16 for x in (k, v)]
    return [*[x.data_ptr() for x in buffers], G, D, N, R, window.shape[3], *bits, m > 1, v.shape[0] > 1, DTYPES[retained.dtype],
            magnitude.dtype == torch.float16]


@functools.cache
def load() -> bool:
    """Register the form for CPU tensors, once a process. False, with a warning on stderr, where it cannot be built."""
    try:
        path = build(capability())
        built = ctypes.CDLL(str(path))
        library.impl("attend", attend_with(built.attend), "CPU")
        library.impl("commit", commit_with(built.commit), "CPU")
    except (OSError, RuntimeError) as error:
        print(f"warning: the C++ kernels were not built ({error}), so the slower reference is used; install g++, name a compiler in CXX, "
              "or a writable folder in XDG_CACHE_HOME", file=sys.stderr)
        return False
    return True
