"""The Triton kernels of `attend` compiled ahead for sm_80 and sm_90, without a device; those of `commit`: test_kernel_triton_commit.py."""
import re
import subprocess
from pathlib import Path

import pytest
import torch
from test_kernel_triton import BF16, FP16, FP32, INTERPRETED
from torch import Tensor

from cache.kernels import triton_attend


def plan(bits: int, *, D: int, dtype: torch.dtype, G: int = 8, B: int = 4) -> list[tuple]:
    """What would be launched for B rows of 32 heads at 8,192 tokens, on meta tensors; 16 bits: the full cache."""
    def make(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    H, N, W, R = (32, 8192, 0, 0) if bits == 16 else (32, 8176, 16, 164)
    stored = make(B, G, N, D, dtype=dtype) if bits == 16 else make(B, G, N, D * bits // 8, dtype=torch.uint8)
    one = {"stored": stored, "magnitude": make(0) if bits == 16 else make(B, G, N, dtype=FP16), "retained": make(B, G, R, D, dtype=dtype),
           "window": make(B, G, W, D, dtype=dtype), "levels": make(2 ** bits if bits < 16 else 0)}
    tensors = {f"{x}_{kind}": tensor for x in "kv" for kind, tensor in one.items()}
    tensors |= dict(q=make(B, H, D, dtype=dtype), k=make(B, G, D, dtype=dtype), v=make(B, G, D, dtype=dtype),
                    length=make(B, dtype=torch.int64), exact=make(B, G, N if R else 0, dtype=torch.bool), threshold=make(0),
                    retained_pos=make(B, G, R, dtype=torch.int32), retained_score=make(B, G, R), rotation=make(D, D))
    return triton_attend.launches(tensors, dtype, sliding_window=0, sms=132)


def compiled(kernel, arguments: dict, options: dict, capability: int, folder: Path) -> tuple[int, int, int]:
    """A launch compiled ahead of time: registers a thread, bytes of stack a thread (where spills go), bytes of shared memory."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    names = {BF16: "bf16", FP16: "fp16", FP32: "fp32", torch.uint8: "u8", torch.int8: "i8", torch.bool: "i1", torch.int32: "i32",
             torch.int64: "i64"}
    signature, constants, aligned = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        x = arguments[name]
        if isinstance(x, Tensor):
            signature[name], aligned[(i,)] = "*" + names[x.dtype], [["tt.divisibility", 16]]
        elif kernel.params[i].is_constexpr or x == 1 and isinstance(x, int):       # a launch specialises on ones, too
            signature[name], constants[name] = "constexpr", x
        else:
            signature[name] = "fp32" if isinstance(x, float) else "i32"
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    (folder / "kernel.cubin").write_bytes(built.asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", folder / "kernel.cubin"]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return *(int(re.search(rf"\b{name}:(\d+)", report)[1]) for name in ("REG", "STACK")), built.metadata.shared


@pytest.mark.skipif(INTERPRETED, reason="the interpreter does not compile")
@pytest.mark.parametrize("capability,bits,D", [
    (80, 4, 128), (90, 4, 128), (90, 3, 96), (80, 3, 128), (90, 2, 64), (90, 4, 256), (90, 8, 128), (90, 16, 128)])
def test_compiles_ahead(capability: int, bits: int, D: int, record_property, tmp_path: Path) -> None:
    """Guards: what only the compiler refuses, more registers that spill to memory, shared memory beyond the chip's (164 KB, 227 KB)."""
    last = [plan(bits, D=D, dtype=BF16, B=B)[-1] for B in (64, 1024)]          # few splits, programs alone on a multiprocessor and not
    for kernel, _, arguments, options in [*plan(bits, D=D, dtype=BF16), *last]:
        registers, stack, shared = compiled(kernel, arguments, options, capability, tmp_path)
        line = f"sm_{capability}, {bits} bits: {registers} registers, {stack} bytes spilled, {shared} bytes shared"
        record_property(kernel.__name__, line)
        print(kernel.__name__, line)
        most = 48 if kernel.__name__ == "attend_splits" and bits <= 4 else 0        # outside the loop over codes: see the next test
        assert stack <= most and registers <= 255
        # three programs a multiprocessor at least: that is what hides the latency of their loads
        assert shared * 3 <= {80: 164, 90: 227}[capability] * 1024


@pytest.mark.skipif(INTERPRETED, reason="the interpreter does not compile")
@pytest.mark.parametrize("bits,heads,most", [(4, 4, 22), (3, 4, 20), (2, 4, 17), (4, 8, 27), (2, 8, 22), (4, 16, 38)])
def test_a_column_takes_few_instructions(bits: int, heads: int, most: int, record_property, tmp_path: Path) -> None:
    """Guards: codes that a GPU reads faster than it decodes: a lookup that grows, codes or numbers that move through shared memory, spills
    in the loop; and a warp that waits for a load where it was begun, for what the loop takes is then the memory's latency."""
    import triton
    kernel, _, arguments, options = plan(bits, D=128, dtype=BF16, G=32 // heads, B=32)[-2]
    compiled(kernel, arguments, options, 90, tmp_path)
    tool = Path(triton.knobs.nvidia.cuobjdump.path).with_name("nvdisasm")
    lines = subprocess.run([tool, "-c", tmp_path / "kernel.cubin"], capture_output=True, text=True, check=True).stdout.splitlines()
    labels = {line.strip(": \t"): i for i, line in enumerate(lines) if re.match(r"\s*\.L\S+:", line)}
    ends = ((labels.get(match[1], i), i) for i, line in enumerate(lines) if (match := re.search(r"BRA.*`\((\.L\S+)\)", line)))
    loop = next(lines[begin:end + 1] for begin, end in ends if begin < end and any("IMMA" in line for line in lines[begin:end]))
    loop = [line for line in loop if ";" in line]
    loads = [(i, int(match[2]), {".64": 2, ".128": 4}.get(match[1], 1)) for i, line in enumerate(loop)
             if (match := re.search(r"LDG\.E(\.\w+)? R(\d+),", line))]
    used = [next(n for n in range(1, len(loop)) if any(re.search(rf"\bR{at + j}\b", loop[(i + n) % len(loop)]) for j in range(registers)))
            for i, at, registers in loads]
    count = len(loop) * options["num_warps"] / arguments["BLOCK"]
    spilled, stored = (sum(name in line for line in loop) for name in (" LDL", " STS"))
    line = (f"sm_90, {bits} bits, {heads} heads a kv head: {count:.1f} instructions a column, {spilled} words a tile spilled; "
            f"a load is used {min(used)} later")
    record_property("merged loop", line)
    print(line)
    assert count < most and min(used) > (40 if heads == 4 else 25)
    assert stored <= 12 and (heads > 8 or spilled <= 2)
