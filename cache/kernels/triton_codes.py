"""Codes in Triton: what a stored vector becomes on its way into a tensor core. triton_kernels.py attends with it.

A vector of D coordinates is a tuple of slots, [columns, P] for K and [P, columns] for V; queries are loaded and sums stored by the same
slots (`coordinates`). P is D / slots rounded up to 2^k.
  Up to 4 bits: numbers. K becomes int8, V bf16, whole numbers on the grid of 7 bits that lies nearest to the levels, as in block.h. prmt
    looks up four codes at once in 8 bytes. A query head takes two columns of the product, a probability too: a coarse part and what it
    leaves, so neither is rounded to 8 bits.
  4 and 2 bits: assembly takes one register of codes and gives one of a slot's numbers. Triton then moves codes, not numbers, through
    shared memory, and ptxas computes once what the slots' pieces have in common.
  8 bits, and codes of fp32 models: levels from memory.
Traps: numbers stand for the codec's own levels, known when the kernel is compiled, not for the tensor that the operator gets. And
lanemask_lt & lanemask_gt is zero, which ptxas does not know: it keeps tables in registers instead of moving them there each time.
"""
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


GRID = tl.constexpr({bits: grid(bits) for bits in (4, 3, 2)})     # constexpr: a part of the key by which Triton keeps compiled kernels


@triton.constexpr_function
def grid_step(bits):
    return GRID.value[bits][1]


@triton.constexpr_function
def slots(bits, pairs=False):
    """How many tiles a vector decodes to: one per code of a byte of the low plane (1 where it is not coded); pairs: of two bytes."""
    return (8 // PLANES[bits][0] if bits < 16 else 1) * (2 if pairs else 1)


def tables(bits: int) -> str:
    """PTX that fills t0 .. with the grid's numbers, four each, and m with zero."""
    words = [sum(n << 8 * i for i, n in enumerate(GRID.value[bits][0][at:at + 4])) for at in range(0, 2 ** bits, 4)]
    zero = ".reg .b32 m, t0, t1, t2, t3, x, y, a, b, c, d; mov.u32 m, %lanemask_lt; mov.u32 a, %lanemask_gt; and.b32 m, m, a;"
    return zero + "".join(f"or.b32 t{i}, m, {word:#x};" for i, word in enumerate(words))


TABLES = tl.constexpr({bits: tables(bits) for bits in GRID.value})


@triton.constexpr_function
def number_asm(bits, slot, pairs):
    """PTX from 32 bits of codes of 4 or 2 bits to a slot of their numbers: for K four of int8, one of each byte; for V (pairs) two of bf16,
    one of each two bytes. A nibble with its top bit set finds 0 in a table, as no number has its top bit set.
    """
    place, byte = (slot // 2, slot % 2) if pairs else (slot, 0)
    nibble, turn = divmod(place, 4 // bits)         # 2 bits: every other place has a nibble for itself, the rest have the next turn
    if bits == 4:
        code = ["xor.b32 y, $1, 0x88888888; prmt.b32 a, t0, t1, $1; prmt.b32 b, t2, t3, y; add.u32 a, a, b;",
                "shr.u32 x, $1, 16; shr.u32 y, y, 16; prmt.b32 c, t0, t1, x; prmt.b32 d, t2, t3, y; add.u32 c, c, d;"]
    else:
        code = [f"shr.u32 x, $1, {2 * turn}; and.b32 x, x, 0x33333333; shr.u32 y, x, 16; prmt.b32 a, t0, 0, x; prmt.b32 c, t0, 0, y;"]
    if pairs:
        code += ["or.b32 m, m, 0x43004300;", f"prmt.b32 a, a, c, {0x8480 + 0x1111 * (2 * byte + nibble):#x}; add.u32 $0, a, m;"]
    else:
        code += [f"prmt.b32 $0, a, c, {0x6420 + 0x1111 * nibble:#x};"]
    return "{" + TABLES.value[bits] + "\n".join(code) + "}"


@triton.constexpr_function
def number_asm_3(to_bf16):
    """PTX from 4 bytes of the low plane of 3 bits, 16 codes, to all slots of their numbers: each one register of int8, or two of bf16.

    Operands after the slots: 4 bytes of the low plane, of the high plane, and 255 where the odd bits of the high plane are theirs, else 0:
    of its bits place s has 2 s + 1, or 2 s.
    """
    low, high, odd = (f"${(8 if to_bf16 else 4) + i}" for i in range(3))
    code = [f"shr.u32 a, {high}, 1; xor.b32 a, a, {high}; and.b32 a, a, {odd}; xor.b32 b, a, {high};",         # bit 2 s of b: place s
            f"shl.b32 x, b, 2; and.b32 x, x, 0x44444444; and.b32 y, {low}, 0x33333333; or.b32 x, x, y;",
            f"and.b32 b, b, 0x44444444; shr.u32 y, {low}, 2; and.b32 y, y, 0x33333333; or.b32 y, y, b; or.b32 m, m, 0x43434343;"]
    for turn, codes in enumerate("xy"):
        code += [f"prmt.b32 a, t0, t1, {codes}; shr.u32 b, {codes}, 16; prmt.b32 c, t0, t1, b;"]
        for nibble in range(2):
            place = 2 * nibble + turn
            if to_bf16:
                code += [f"prmt.b32 ${2 * place + i}, {half}, m, {0x4240 + 0x0101 * nibble:#x};" for i, half in enumerate("ac")]
            else:
                code += [f"prmt.b32 ${place}, a, c, {0x6420 + 0x1111 * nibble:#x};"]
    return "{" + TABLES.value[3] + "\n".join(code) + "}"


@triton.jit
def coordinates(slot: tl.constexpr, P: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr, PAIRS: tl.constexpr):
    """The coordinates [P] that a slot holds; pads come to D or more."""
    EACH: tl.constexpr = D // slots(BITS)       # bytes of the low plane, where codes of a place lie in order
    byte, place = tl.arange(0, P), slot
    if PAIRS:
        byte, place = 2 * byte + slot % 2, slot // 2
    return tl.where(byte < EACH, byte + place * EACH, D)


# -- columns ----------------------------------------------------------------------------------------------------------------------------
@triton.jit
def load_stored(stored, column, seen, BITS: tl.constexpr, D: tl.constexpr, SLOTS: tl.constexpr, P: tl.constexpr, PAIRS: tl.constexpr,
                TURN: tl.constexpr):
    """Columns of K or V as stored: vectors ([P, BLOCK] if TURN), or the low and the high plane of their codes, [BLOCK, P] each. PAIRS:
    two bytes an element."""
    ROW: tl.constexpr = D * 3 // 8 if BITS == 3 else D // SLOTS
    j = tl.arange(0, P)
    at = (stored.to(tl.pointer_type(tl.int16)) if PAIRS else stored) + column[:, None] * ROW
    here = seen[:, None]
    if P * SLOTS > D:
        here = here & (j < D // SLOTS)[None, :]
    if BITS == 16 and TURN:
        low = tl.load(tl.trans(at) + j[:, None], mask=tl.trans(here), other=0)
    else:
        low = tl.load(at + j[None, :], mask=here, other=0)
    high = low
    if BITS == 3:
        high = tl.load(at + D // 4 + (j % (D // 8))[None, :], mask=here, other=0)
    return low, high


@triton.jit
def decode(packed, levels, BITS: tl.constexpr, D: tl.constexpr, SLOTS: tl.constexpr, DTYPE: tl.constexpr, NUMBERS: tl.constexpr,
           TURN: tl.constexpr):
    """What `load_stored` gave -> a tuple of slots, [BLOCK, P] ([P, BLOCK] if TURN, then bf16 of numbers)."""
    low, high = packed
    out = ()
    # 3 bits: coordinate c has bit c div (D / 8) of byte c mod (D / 8) in the high plane: a slot takes two bits of every byte
    odd = (tl.arange(0, low.shape[1]) >= D // 8)[None, :] if BITS == 3 else 0
    if BITS == 16:
        out = (low,)
    elif NUMBERS and BITS == 3:
        odd = tl.where(odd, 255, 0).to(tl.uint8)
        if TURN:
            x = tl.inline_asm_elementwise(number_asm_3(True), "=r,=r,=r,=r,=r,=r,=r,=r,r,r,r", [low, high, odd],
                                          dtype=(tl.int16, tl.int16, tl.int16, tl.int16), is_pure=True, pack=4)
            for slot in tl.static_range(SLOTS):
                out += (tl.trans(x[slot].to(tl.bfloat16, bitcast=True)),)
        else:
            out = tl.inline_asm_elementwise(number_asm_3(False), "=r,=r,=r,=r,r,r,r", [low, high, odd],
                                            dtype=(tl.int8, tl.int8, tl.int8, tl.int8), is_pure=True, pack=4)
    elif NUMBERS:
        codes = tl.trans(low) if TURN else low
        for slot in tl.static_range(SLOTS):
            if TURN:
                x = tl.inline_asm_elementwise(number_asm(BITS, slot, True), "=r,r", [codes], dtype=tl.int16, is_pure=True, pack=2)
                out += (x.to(tl.bfloat16, bitcast=True),)
            else:
                out += (tl.inline_asm_elementwise(number_asm(BITS, slot, False), "=r,r", [codes], dtype=tl.int8, is_pure=True, pack=4),)
    else:
        for slot in tl.static_range(SLOTS):
            code = (low >> slot * (8 // SLOTS)) & (2 ** (8 // SLOTS) - 1)
            if BITS == 3:
                code |= (((high >> odd.to(tl.uint8)) >> 2 * slot) & 1) << 2
            y = tl.load(levels + code).to(DTYPE)
            out += (tl.trans(y) if TURN else y,)
    return out


# -- queries and probabilities ------------------------------------------------------------------------------------------------------------
@triton.jit
def load_query(q, HEADS: tl.constexpr, HP: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr, SLOTS: tl.constexpr, P: tl.constexpr,
               DTYPE: tl.constexpr):
    """The query heads of one kv head, [HEADS, D], as a tuple of slots [P, HP]."""
    h = tl.arange(0, HP)
    out = ()
    for slot in tl.static_range(SLOTS):
        d = coordinates(slot, P, D, BITS, False)
        at = q + h[None, :] * D + d[:, None]
        out += (tl.load(at, mask=(h < HEADS)[None, :] & (d < D)[:, None], other=0).to(DTYPE),)
    return out


@triton.jit
def load_query_numbers(q, HEADS: tl.constexpr, HP: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr, SLOTS: tl.constexpr,
                       P: tl.constexpr):
    """Likewise as int8, for numbers of K: slots [P, 2 HP], a head's coarse and fine part side by side, 128 coarse + fine in all; then
    unit [HP], what 1 of a product is worth, and middle [HP], what products have too much as numbers are not signed."""
    n = tl.arange(0, 2 * HP)
    exact, most = (), tl.full([2 * HP], 1e-30, tl.float32)
    for slot in tl.static_range(SLOTS):
        d = coordinates(slot, P, D, BITS, False)
        at = q + (n // 2)[:, None] * D + d[None, :]
        exact += (tl.load(at, mask=(n // 2 < HEADS)[:, None] & (d < D)[None, :], other=0).to(tl.float32),)
        most = tl.maximum(most, tl.max(tl.abs(exact[slot]), 1))
    out, total = (), tl.zeros([2 * HP], tl.int32)
    for slot in tl.static_range(SLOTS):
        x = exact[slot] / (most / 127)[:, None]
        coarse = tl.floor(x + 0.5)
        part = tl.where((n % 2 == 0)[:, None], coarse, tl.floor((x - coarse) * 128 + 0.5)).to(tl.int8)
        total += tl.sum(part.to(tl.int32), 1)
        out += (tl.trans(part),)
    most, _ = deinterleave(most)
    STEP: tl.constexpr = grid_step(BITS)
    return out, most * (STEP / (127 * 128)), coarse_and_fine(total) * MIDDLE


@triton.jit
def deinterleave(x):
    """x [..., 2 n] -> its even and its odd columns."""
    return tl.split(tl.reshape(x, x.shape[:-1] + [x.shape[-1] // 2, 2]))


@triton.jit
def coarse_and_fine(x):
    """Coarse and fine columns [..., 2 n] int32 -> what they are together."""
    coarse, fine = deinterleave(x)
    return coarse * 128 + fine


@triton.jit
def interleave(x, y):
    """x, y [..., n] -> [..., 2 n], columns in turns."""
    return tl.reshape(tl.join(x, y), x.shape[:-1] + [2 * x.shape[-1]])
