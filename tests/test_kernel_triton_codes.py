"""The assembly that turns codes to numbers (cache/kernels/triton_codes.py), run instruction by instruction, against the codec."""
import importlib.util
import re

import numpy as np
import pytest
import torch

from cache.codec import Codec, rotation_matrix

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed (pip install triton)", allow_module_level=True)


def prmt(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """PTX prmt.b32, default mode: each nibble picks one of 8 bytes, or with its top bit set 8 copies of that byte's sign."""
    source = np.stack([x >> 8 * i & 255 for x in (a, b) for i in range(4)])
    out = np.zeros_like(selector)
    for i in range(4):
        nibble = selector >> 4 * i & 15
        byte = np.take_along_axis(source, (nibble & 7)[None].astype(np.int64), 0)[0]
        out |= np.where(nibble & 8, (byte >> 7) * np.uint32(255), byte) << 8 * i
    return out


OPERATIONS = {"and.b32": np.bitwise_and, "or.b32": np.bitwise_or, "xor.b32": np.bitwise_xor, "prmt.b32": prmt,
              "shl.b32": np.left_shift, "shr.u32": np.right_shift, "add.u32": np.add, "mov.b32": np.copy, "mov.u32": np.copy}


def run_ptx(text: str, constraints: str, inputs: list[np.ndarray]) -> list[np.ndarray]:
    """A block of PTX without jumps on uint32 registers [N]: inputs $n, $n + 1, ... -> outputs $0 .. $n - 1."""
    kinds = constraints.split(",")
    n = kinds.count("=r")
    assert kinds == ["=r"] * n + ["r"] * len(inputs)
    register = {f"${n + i}": x for i, x in enumerate(inputs)} | {f"%lanemask_{side}": np.zeros_like(inputs[0]) for side in ("lt", "gt")}
    for line in filter(str.strip, re.split("[;\n]", text.strip("{}"))):
        operation, to, *source = line.replace(",", " ").split()
        if operation != ".reg":
            values = [register[x] if x in register else np.full_like(inputs[0], int(x, 0)) for x in source]
            register[to] = OPERATIONS[operation](*values).astype(np.uint32)
    return [register[f"${i}"] for i in range(n)]


@pytest.mark.parametrize("pairs", [False, True], ids=["K", "V"])
@pytest.mark.parametrize("bits", [4, 2])
def test_assembly_numbers_every_byte(bits: int, pairs: bool) -> None:
    """Guards: a code, a place or an order wrong in the lookup, against the grid's number of each code of all bytes."""
    from cache.kernels.triton_codes import BASE, GRID, number_asm, slots
    packed = torch.randint(0, 256, (4096, 2), generator=torch.Generator().manual_seed(bits), dtype=torch.uint8)
    packed[:256, 0] = packed[256:512, 1] = torch.arange(256)
    codes = packed[..., None] >> torch.arange(0, 8, bits, dtype=torch.uint8) & 2 ** bits - 1         # [column, byte, place]
    want = torch.tensor(GRID.value[bits][0])[codes.int()]
    for slot in range(slots(bits, pairs)):
        out = run_ptx(number_asm(bits, slot, pairs), "=r,r", [packed.numpy().reshape(-1).view(np.uint32)])[0]
        if pairs:       # a unit of two bytes gives one code of them
            got = torch.from_numpy(out.view(np.int16)).view(torch.bfloat16).float() - BASE.value
            assert torch.equal(got, want[:, slot % 2, slot // 2].float()), f"slot {slot}"
        else:
            assert torch.equal(torch.from_numpy(out.view(np.int8)).view(-1, 2).long(), want[..., slot]), f"slot {slot}"


@pytest.mark.parametrize("to_bf16", [False, True], ids=["K", "V"])
def test_assembly_numbers_every_byte_of_3_bits(to_bf16: bool) -> None:
    """Guards: a code or an order wrong in the lookup, against the codec's own decoding of all bytes of both planes."""
    from cache.kernels.triton_codes import BASE, GRID, number_asm_3
    D = 64
    codec = Codec(3, rotation_matrix(D).float())
    codec.levels.copy_(torch.tensor(GRID.value[3][0]))
    packed = torch.randint(0, 256, (512, D * 3 // 8), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
    packed[:256] = torch.arange(256, dtype=torch.uint8)[:, None]
    low, j = packed[:, :D // 4].contiguous(), torch.arange(D // 4)
    high = packed[:, D // 4 + j % (D // 8)].contiguous()
    odd = (255 * (j >= D // 8)).to(torch.uint8).expand(512, -1).contiguous()
    n, inputs = 8 if to_bf16 else 4, [t.numpy().view(np.uint32).reshape(-1) for t in (low, high, odd)]
    out = np.stack(run_ptx(number_asm_3(to_bf16), ",".join(["=r"] * n + ["r"] * 3), inputs), 1).reshape(512, D // 16, 4, n // 4)
    out = torch.from_numpy(np.ascontiguousarray(out.transpose(0, 2, 1, 3)).view(np.int16 if to_bf16 else np.int8).reshape(512, D))
    assert torch.equal(out.view(torch.bfloat16).float() - BASE.value if to_bf16 else out.float(), codec.decode(packed))
