"""Codes in Triton: what a stored vector becomes on its way into a tensor core, and in which order. triton_operands.py loads by it.

A vector of D coordinates is a tuple of slots, [columns, P] for K and [P, columns] for V; queries are loaded and sums stored by the same
slots (`k_coordinates`, `v_coordinates`).
  Up to 4 bits: numbers. K becomes int8, V bf16, whole numbers on the grid of 7 bits that lies nearest to the levels, as in block.h. prmt
    looks up four codes at once in 8 bytes. A query head takes two columns of the product, a probability too: a coarse part and what it
    leaves, so neither is rounded to 8 bits. Coordinates stand in the order in which they can be loaded: what a thread of a warp loads is
    its own part of the tensor core's operand, and codes go through no shared memory.
  8 bits, and codes of fp32 models or of head dimensions below 64 or not multiples of 32: levels from memory.
Traps: numbers stand for the codec's own levels, known when the kernel is compiled, not for the tensor that the operator gets. And
lanemask_lt & lanemask_gt is zero, which ptxas does not know: it keeps tables in registers instead of moving them there each time.
"""
import torch
import triton
import triton.language as tl

from cache.codec import PLANES, normal_levels

MIDDLE = tl.constexpr(63)           # the number of level 0
BASE = tl.constexpr(128)            # of bf16's bits 0x43uu: it is 128 + uu where uu has 7 bits


def grid(bits: int) -> tuple[list[int], float]:
    """The codes' levels as whole numbers 0 .. 126, and the step between two: level = (number - 63) * step, nearly."""
    levels = normal_levels(bits)
    steps = [levels[-1] / n for n in range(MIDDLE.value, 47, -1)]
    step = min(steps, key=lambda s: sum((x - s * round(x / s)) ** 2 for x in levels))
    return [MIDDLE.value + round(x / step) for x in levels], step


def becomes_numbers(bits: int, D: int, dtype: torch.dtype) -> bool:
    """Whether K or V of a model of `dtype` does, rather than levels."""
    return bits <= 4 and dtype != torch.float32 and D >= 64 and D % 32 == 0


GRID = tl.constexpr({bits: grid(bits) for bits in (4, 3, 2)})     # constexpr: a part of the key by which Triton keeps compiled kernels


@triton.constexpr_function
def grid_step(bits):
    return GRID.value[bits][1]


@triton.constexpr_function
def turns(bits):
    """Codes in a nibble: a lookup takes one of them, the next turn the other."""
    return 1 if bits == 4 else 2


@triton.constexpr_function
def slots(bits):
    """How many tiles a vector decodes to: one per code of a byte of the low plane (1 where it is not coded). V's numbers: v_slots."""
    return 8 // PLANES[bits][0] if bits < 16 else 1


@triton.constexpr_function
def v_shape(D, bits):
    """V's numbers: (units, words). A unit is a row of a slot's tile: the codes of a word, or of a part of it, one for each slot. Words: of
    32 bits of the low plane, as a power of 2."""
    D = triton.next_power_of_2(D)
    return max(16, D // 8), D // slots(bits) // 4


@triton.constexpr_function
def v_slots(D):
    return min(8, triton.next_power_of_2(D) // 16)


def tables(bits: int) -> str:
    """PTX that fills t0 .. with the grid's numbers, four each, m with zero and s with 2 ** 16."""
    words = [sum(n << 8 * i for i, n in enumerate(GRID.value[bits][0][at:at + 4])) for at in range(0, 2 ** bits, 4)]
    zero = ".reg .b32 m, s, t0, t1, t2, t3, w, h, x, y, a, b; mov.u32 m, %lanemask_lt; mov.u32 a, %lanemask_gt; and.b32 m, m, a;"
    return zero + "or.b32 s, m, 65536;" + "".join(f"or.b32 t{i}, m, {word:#x};" for i, word in enumerate(words))


TABLES = tl.constexpr({bits: tables(bits) for bits in GRID.value})


def lookups(bits: int, halves: int) -> list[tuple[int, int, str]]:
    """(turn, half, PTX from w to a): the four numbers of a turn and of a half of w, whose nibbles hold a code of 4 or two of 2 bits.

    Of 3 bits these are the low two, and bit 2 s of a byte of h is the high one of its place s. A nibble with its top bit set finds 0 in a
    table, as no number has its top bit set. The upper half comes down by a product with s: shifts would go where lookups crowd.
    """
    out = []
    for turn in range(turns(bits)):
        code = "xor.b32 y, w, 0x88888888; mov.b32 x, w;" if bits == 4 else f"shr.u32 x, w, {2 * turn}; and.b32 x, x, 0x33333333;"
        if bits == 3:
            code += f"shl.b32 y, h, {2 - 2 * turn}; and.b32 y, y, 0x44444444; or.b32 x, x, y;"
        for half in range(halves):
            code += "mul.hi.u32 x, x, s; mul.hi.u32 y, y, s;" if half and bits == 4 else "mul.hi.u32 x, x, s;" if half else ""
            code += f"prmt.b32 a, t0, {'0' if bits == 2 else 't1'}, x;"
            out.append((turn, half, code + "prmt.b32 b, t2, t3, y; add.u32 a, a, b;" * (bits == 4)))
            code = ""
    return out


def k_asm(bits: int) -> str:
    """PTX from 4 bytes of the low plane to all slots of their numbers, four of int8 each. 3 bits also read 4 bytes of the high plane, then
    four times 1 where its odd bits are theirs, else 0."""
    n = slots(bits)
    code = [f"mov.b32 w, ${n};"] + [f"and.b32 a, ${n + 2}, 1; shr.u32 h, ${n + 1}, a;"] * (bits == 3)
    code += [f"{lookup} mov.b32 ${turns(bits) * half + turn}, a;" for turn, half, lookup in lookups(bits, 2)]
    return "{" + TABLES.value[bits] + "\n".join(code) + "}"


def v_asm(bits: int, n: int) -> str:
    """PTX from the units of two columns, low in 32 bits each, to n slots of their numbers, bf16, the first column's low. 3 bits also read
    their units of the high plane."""
    code, width = ["or.b32 m, m, 0x43004300;"], 4 * turns(bits)             # codes in two bytes
    for at, pick in zip(range(0, n, width), ("0x5140", "0x7362"), strict=False):
        code += [f"prmt.b32 w, ${n}, ${n + 1}, {pick};"] + [f"prmt.b32 h, ${n + 2}, ${n + 3}, {pick};"] * (bits == 3)
        for turn, half, lookup in lookups(bits, min(2, 2 * (n - at) // width)):
            slot = at + half * width // 2 + 2 * turn
            code += [lookup, f"lop3.b32 ${slot}, a, 0x00ff00ff, m, 0xea; prmt.b32 ${slot + 1}, a, m, 0x7371;"]
    return "{" + TABLES.value[bits] + "\n".join(code) + "}"


K_ASM = tl.constexpr({bits: k_asm(bits) for bits in GRID.value})
V_ASM_8, V_ASM_4 = (tl.constexpr({bits: v_asm(bits, n) for bits in GRID.value}) for n in (8, 4))


@triton.jit
def k_byte(i, P: tl.constexpr):
    """The byte of the low plane that K's numbers have at i: of 4 PER bytes thread t of four loads PER in a row, see `load_k`."""
    PER: tl.constexpr = min(16, P // 4)
    return i // (4 * PER) * (4 * PER) + i // 4 % 4 * PER + i % (4 * PER) // 16 * 4 + i % 4


@triton.jit
def k_coordinates(at, P: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr, NUMBERS: tl.constexpr):
    """The coordinates that K has at slot P + i, or V where it becomes no numbers; pads come to D or more."""
    EACH: tl.constexpr = D // slots(BITS)       # bytes of the low plane, where codes of a place lie in order
    slot, i = at // P, at % P
    byte, place = i, slot
    if NUMBERS:
        TURNS: tl.constexpr = turns(BITS)
        byte, place = k_byte(i, P) - i % 4 + slot // TURNS * 2 + i % 4 // 2, i % 2 * TURNS + slot % TURNS
    return tl.where(byte < EACH, byte + place * EACH, D)


@triton.jit
def v_coordinates(slot, P: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr, NUMBERS: tl.constexpr):
    """The coordinates [P] of a slot of V, likewise."""
    if NUMBERS:
        SHAPE: tl.constexpr = v_shape(D, BITS)
        TURNS: tl.constexpr = turns(BITS)
        EACH: tl.constexpr = D // slots(BITS)
        unit = tl.arange(0, P)
        byte = unit % SHAPE[1] * 4 + unit // SHAPE[1] * (4 * SHAPE[1] // P) + slot // (2 * TURNS)
        return tl.where(byte < EACH, byte + (slot % 2 * TURNS + slot // 2 % TURNS) * EACH, D)
    else:
        return k_coordinates(slot * P + tl.arange(0, P), P, D, BITS, False)
