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


def lop3(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: np.ndarray) -> np.ndarray:
    """PTX lop3.b32: bit by bit, the bit of `table` at 4 a + 2 b + c."""
    out = np.zeros_like(a)
    for i in range(8):
        if table[0] >> i & 1:
            out |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return out


def mul_hi(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return a.astype(np.uint64) * b >> np.uint64(32)


OPERATIONS = {"and.b32": np.bitwise_and, "or.b32": np.bitwise_or, "xor.b32": np.bitwise_xor, "shl.b32": np.left_shift,
              "shr.u32": np.right_shift, "add.u32": np.add, "mul.hi.u32": mul_hi, "mov.b32": np.copy, "mov.u32": np.copy, "prmt.b32": prmt,
              "lop3.b32": lop3}


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


def unpacked(packed: torch.Tensor, bits: int, D: int) -> torch.Tensor:
    """The grid's number of each coordinate [..., D] by the codec."""
    from cache.kernels.triton_codes import GRID
    codec = Codec(bits, rotation_matrix(D).float())
    codec.levels.copy_(torch.tensor(GRID.value[bits][0]))
    return codec.decode(packed)


def words(x: torch.Tensor) -> np.ndarray:
    return np.ascontiguousarray(x.numpy()).view(np.uint32)


@pytest.mark.parametrize("D", [64, 96, 128, 256])
@pytest.mark.parametrize("bits", [4, 3, 2])
def test_assembly_numbers_every_code(bits: int, D: int) -> None:
    """Guards: a code, a place or an order wrong in the lookup of K or V, against the codec's own decoding of all bytes."""
    from cache.kernels.triton_codes import BASE, k_asm, slots, turns, v_asm, v_shape, v_slots
    packed = torch.randint(0, 256, (512, D * bits // 8), generator=torch.Generator().manual_seed(bits), dtype=torch.uint8)
    packed[:256] = torch.arange(256, dtype=torch.uint8)[:, None]
    want, each = unpacked(packed, bits, D), D // slots(bits)
    low, high = packed[:, :each], packed[:, each:]
    # K: a register has a word of the low plane
    byte, n = torch.arange(each), slots(bits)
    inputs = [words(low)]
    if bits == 3:
        inputs += [words(high[:, byte % (D // 8)]), words((byte >= D // 8).to(torch.uint8).expand(512, -1).contiguous())]
    out = run_ptx(k_asm(bits), ",".join(["=r"] * n + ["r"] * len(inputs)), [x.reshape(-1) for x in inputs])
    for slot in range(n):
        got = torch.from_numpy(out[slot].view(np.int8)).view(512, each)
        at = byte // 4 * 4 + slot // turns(bits) * 2 + byte % 4 // 2 + (byte % 2 * turns(bits) + slot % turns(bits)) * each
        assert torch.equal(got.float(), want[:, at]), f"K, slot {slot}"
    # V: two registers have the units of two columns
    (units, count), n = v_shape(D, bits), v_slots(D)
    unit = np.arange(units)
    word, shift = unit % count, unit // count * (32 * count // units)
    unit, word, shift = (x[word * 4 < each] for x in (unit, word, shift))
    inputs = [words(low)[:, word] >> shift]
    if bits == 3:
        inputs += [words(high)[:, word % (D // 32)] >> (shift + (4 * word >= D // 8))]
    pairs = [np.ascontiguousarray(x[i::2]).reshape(-1) for x in inputs for i in range(2)]
    out = run_ptx(v_asm(bits, n), ",".join(["=r"] * n + ["r"] * len(pairs)), [x.astype(np.uint32) for x in pairs])
    for slot in range(n):
        got = torch.from_numpy(out[slot].view(np.int16)).view(torch.bfloat16).view(256, len(unit), 2).transpose(1, 2).reshape(512, -1)
        at = word * 4 + shift // 8 + slot // (2 * turns(bits)) + (slot % 2 * turns(bits) + slot // 2 % turns(bits)) * each
        assert torch.equal(got.float() - BASE.value, want[:, at]), f"V, slot {slot}"
