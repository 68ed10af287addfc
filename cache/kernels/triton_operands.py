"""Operands of the tensor cores in Triton: columns and queries as triton_codes.py orders them. triton_kernels.py multiplies them.

A load's threads are where the tensor core wants them: of a tile [columns, bytes] of int8 thread (g, t), one of 8 x 4, takes rows g, 8 + g,
.., and words t, 4 + t, ..; of [units, columns] of bf16 units g, 8 + g, .. and two columns at 2 t of every eight.
Trap: only the layouts that Triton chooses make that so, in loops without a conversion. What is computed does not depend on them, but the
time does: tests/test_kernel_triton_ahead.py counts instructions. Assembly of K depends on one thing: a register has 4 bytes in a row.
"""
import triton
import triton.language as tl

from cache.kernels.triton_codes import (
    K_ASM,
    V_ASM_4,
    V_ASM_8,
    k_byte,
    k_coordinates,
    slots,
    v_shape,
)

# of a load's dimensions that are alike, Triton gives a warp's threads the first ones before 3.7, the last ones since
FIRST_COME_FIRST = tl.constexpr(tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7))


# -- columns ----------------------------------------------------------------------------------------------------------------------------
@triton.jit
def load_stored(stored, column, seen, BITS: tl.constexpr, D: tl.constexpr, SLOTS: tl.constexpr, P: tl.constexpr, TURN: tl.constexpr):
    """Columns of K or V that become no numbers: vectors ([P, BLOCK] if TURN), or the low and the high plane of codes, [BLOCK, P] each."""
    ROW: tl.constexpr = D * 3 // 8 if BITS == 3 else D // SLOTS
    j = tl.arange(0, P)
    at = stored + column[:, None] * ROW
    here = seen[:, None]
    if P * SLOTS > D:
        here = here & (j < D // SLOTS)[None, :]
    if BITS == 16 and TURN:
        low = tl.load(tl.trans(at) + j[:, None], mask=tl.trans(here), other=0)
    else:
        low = tl.load(at + j[None, :], mask=here, other=0)
    high = low
    if BITS == 3:
        high = tl.load(at + D // 4 + j[None, :] % (D // 8), mask=here, other=0)
    return low, high


@triton.jit
def decode(packed, levels, BITS: tl.constexpr, D: tl.constexpr, SLOTS: tl.constexpr, DTYPE: tl.constexpr, TURN: tl.constexpr):
    """What `load_stored` gave -> a tuple of slots, [BLOCK, P] ([P, BLOCK] if TURN)."""
    low, high = packed
    out = ()
    # 3 bits: coordinate c has bit c div (D / 8) of byte c mod (D / 8) in the high plane: a slot takes two bits of every byte
    odd = (tl.arange(0, low.shape[1]) >= D // 8)[None, :] if BITS == 3 else 0
    if BITS == 16:
        out = (low,)
    else:
        for slot in tl.static_range(SLOTS):
            code = (low >> slot * (8 // SLOTS)) & (2 ** (8 // SLOTS) - 1)
            if BITS == 3:
                code |= (((high >> odd.to(tl.uint8)) >> 2 * slot) & 1) << 2
            y = tl.load(levels + code).to(DTYPE)
            out += (tl.trans(y) if TURN else y,)
    return out


@triton.jit
def load_k(stored, first, N, BITS: tl.constexpr, D: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr):
    """K's low and high plane of columns first .. first + BLOCK, [BLOCK, P] each: a tensor core of int8 wants words t, 4 + t, .. of a column
    from thread t of four, here these are PER bytes in a row (`k_byte`). WHOLE: all columns exist."""
    EACH: tl.constexpr = D // slots(BITS)
    PER: tl.constexpr = min(16, P // 4)
    CHUNKS: tl.constexpr = P // (4 * PER)
    column = tl.arange(0, BLOCK)[None, :, None, None]
    thread = tl.arange(0, CHUNKS)[:, None] * 4 + tl.arange(0, 4)[None, :]
    byte = (thread[:, :, None] * PER + tl.arange(0, PER)[None, None, :])[:, None, :, :]
    at = stored + first.to(tl.int64) * (D * BITS // 8) + column.to(tl.int64) * (D * BITS // 8)
    here = (first + column < N) & (byte < EACH)
    low = load(at + byte, here, WHOLE and P == EACH)
    low = low.reshape(CHUNKS, BLOCK, 4, PER // 4, 4).permute(1, 0, 3, 2, 4).reshape(BLOCK, P)
    high = low
    if BITS == 3:
        high = load(at + EACH + byte % (D // 8), here, WHOLE and P == EACH)
        high = high.reshape(CHUNKS, BLOCK, 4, PER // 4, 4).permute(1, 0, 3, 2, 4).reshape(BLOCK, P)
    return low, high


@triton.jit
def load(at, here, WHOLE: tl.constexpr):
    """What stands at `at`, zero where not `here`; WHOLE: everywhere. Threads take the last dimensions, whatever this Triton would do."""
    at, here = tl.broadcast(at, here)
    if FIRST_COME_FIRST:
        at, here = flip(at), flip(here)
    if WHOLE:
        x = tl.load(at)
    else:
        x = tl.load(at, mask=here, other=0)
    return flip(x) if FIRST_COME_FIRST else x


@triton.jit
def flip(x):
    """The dimensions the other way round, but K's last one, whose bytes lie in a row. Its own inverse."""
    if len(x.shape) == 4:
        return x.permute(2, 1, 0, 3)
    else:
        return x.permute(5, 4, 3, 2, 1, 0)


@triton.jit
def exact_coordinates(DP: tl.constexpr):
    """The coordinates [DP] in the order of `load_exact`."""
    i = tl.arange(0, DP)
    return i // 32 * 32 + i // 2 % 4 * 8 + i // 8 % 4 * 2 + i % 2 if DP >= 32 else i


@triton.jit
def load_exact(at, D: tl.constexpr, DP: tl.constexpr):
    """Vectors at `at` [BLOCK] -> [BLOCK, DP]. A tensor core of bf16 wants two coordinates at 2 t of every eight from thread t of four, here
    it has eight in a row of every 32."""
    if DP >= 32:
        BLOCK: tl.constexpr = at.shape[0]
        d = (tl.arange(0, DP // 32)[:, None, None] * 32 + tl.arange(0, 4)[None, :, None] * 8 + tl.arange(0, 8)[None, None, :])
        x = load(at[None, :, None, None] + d[:, None, :, :], d[:, None, :, :] < D, D == DP)
        return x.reshape(DP // 32, BLOCK, 4, 4, 2).permute(1, 0, 3, 2, 4).reshape(BLOCK, DP)
    else:
        d = tl.arange(0, DP)[None, :]
        return tl.load(at[:, None] + d, mask=d < D, other=0)


@triton.jit
def decode_k(packed, D: tl.constexpr, BITS: tl.constexpr):
    """What `load_k` gave -> a tuple of slots [BLOCK, P] int8."""
    low, high = packed
    odd = (k_byte(tl.arange(0, low.shape[1]), low.shape[1]) >= D // 8).to(tl.uint8)[None, :]
    if BITS == 4:
        return tl.inline_asm_elementwise(K_ASM[BITS], "=r,=r,r,r,r", [low, high, odd], dtype=(tl.int8, tl.int8), is_pure=True, pack=4)
    else:
        return tl.inline_asm_elementwise(K_ASM[BITS], "=r,=r,=r,=r,r,r,r", [low, high, odd], is_pure=True, pack=4,
                                         dtype=(tl.int8, tl.int8, tl.int8, tl.int8))


@triton.jit
def load_v(stored, first, N, BITS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr):
    """V's units of the low and the high plane of columns first .. first + BLOCK, [units / 8, BLOCK / 16, 2, 2, 8, 4] int32 each: unit
    8 e + g of column 16 m + 8 i + 2 t + j is at [e, m, i, j, g, t]. WHOLE: all columns exist."""
    SHAPE: tl.constexpr = v_shape(D, BITS)
    WORDS: tl.constexpr = SHAPE[1]
    EACH: tl.constexpr = D // slots(BITS)
    MORE: tl.constexpr = max(1, WORDS // 8)
    m, i = tl.arange(0, BLOCK // 16)[None, :, None, None, None, None], tl.arange(0, 2)[None, None, :, None, None, None]
    j, g = tl.arange(0, 2)[None, None, None, :, None, None], tl.arange(0, 8)[None, None, None, None, :, None]
    e, t = tl.arange(0, MORE)[:, None, None, None, None, None], tl.arange(0, 4)[None, None, None, None, None, :]
    column = 16 * m + 8 * i + 2 * t + j
    word = (g ^ 8 * e) % WORDS              # + would tell Triton that words lie in a row: one thread would load four of them
    at = stored + first.to(tl.int64) * (D * BITS // 8) + column.to(tl.int64) * (D * BITS // 8)
    here = (first + column < N) & (4 * word < EACH)
    low = load((at + 4 * word).to(tl.pointer_type(tl.int32)), here, WHOLE and 4 * WORDS == EACH)
    high = low
    if BITS == 3:
        high = load((at + EACH + 4 * (word % (D // 32))).to(tl.pointer_type(tl.int32)), here, WHOLE and 4 * WORDS == EACH)
        high = high >> tl.where(4 * word >= D // 8, 1, 0)
    if SHAPE[0] > WORDS:                    # units are parts of words
        SHIFT: tl.constexpr = 32 * WORDS // SHAPE[0]
        unit = tl.arange(0, SHAPE[0] // 8 // MORE)[:, None, None] * (8 * MORE) + tl.reshape(8 * e + g, [MORE, 8])[None, :, :]
        part = unit[:, :, None, None, None, :, None] // WORDS * SHIFT
        low = (low[None, :, :, :, :, :, :] >> part).reshape(SHAPE[0] // 8, BLOCK // 16, 2, 2, 8, 4)
        high = (high[None, :, :, :, :, :, :] >> part).reshape(SHAPE[0] // 8, BLOCK // 16, 2, 2, 8, 4)
    return low, high


@triton.jit
def decode_v(packed, BITS: tl.constexpr, SLOTS: tl.constexpr):
    """What `load_v` gave -> a tuple of slots [units, BLOCK] bf16, BASE more than their numbers."""
    low, high = packed
    UNITS: tl.constexpr = low.shape[0] * 8
    BLOCK: tl.constexpr = low.shape[1] * 16
    low, high = low.permute(0, 4, 1, 2, 5, 3).reshape(UNITS, BLOCK), high.permute(0, 4, 1, 2, 5, 3).reshape(UNITS, BLOCK)
    if SLOTS == 8:
        x = tl.inline_asm_elementwise(V_ASM_8[BITS], "=r,=r,=r,=r,=r,=r,=r,=r,r,r,r,r", [low, high], is_pure=True, pack=2, dtype=(
            tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16))
    else:
        x = tl.inline_asm_elementwise(V_ASM_4[BITS], "=r,=r,=r,=r,r,r,r,r", [low, high], is_pure=True, pack=2,
                                      dtype=(tl.int16, tl.int16, tl.int16, tl.int16))
    out = ()
    for slot in tl.static_range(SLOTS):
        out += (x[slot].to(tl.bfloat16, bitcast=True),)
    return out


# -- queries and probabilities ------------------------------------------------------------------------------------------------------------
@triton.jit
def load_query(q, HEADS: tl.constexpr, HP: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr, SLOTS: tl.constexpr, P: tl.constexpr,
               DTYPE: tl.constexpr):
    """The query heads of one kv head, [HEADS, D], as a tuple of slots [P, HP]."""
    h = tl.arange(0, HP)
    out = ()
    for slot in tl.static_range(SLOTS):
        d = k_coordinates(slot * P + tl.arange(0, P), P, D, BITS, False)
        at = q + h[None, :] * D + d[:, None]
        out += (tl.load(at, mask=(h < HEADS)[None, :] & (d < D)[:, None], other=0).to(DTYPE),)
    return out


@triton.jit
def to_numbers(x):
    """Queries [16, N] fp32 as whole numbers 128 coarse + fine of 15 bits: coarse, fine [16, N], what 1 is worth [16]."""
    unit = tl.maximum(tl.max(tl.abs(x), 1), 1e-30) / 127
    x = x / unit[:, None]
    coarse = tl.floor(x + 0.5)
    return coarse, tl.floor((x - coarse) * 128 + 0.5), unit / 128


@triton.jit
def load_query_numbers(numbers, units, middles, first, HEADS: tl.constexpr, HP: tl.constexpr, SLOTS: tl.constexpr, P: tl.constexpr):
    """What `rotate` left of query heads first .. first + HEADS: slots [P, 2 HP] int8, a head's coarse and fine part side by side; unit
    [HP], what 1 of a product is worth, and middle [HP], what products have too much as numbers are not signed."""
    n, h = tl.arange(0, 2 * HP)[:, None], tl.arange(0, HP)
    out = ()
    for slot in tl.static_range(SLOTS):
        at = numbers + (2 * first + n) * (SLOTS * P) + slot * P + tl.arange(0, P)[None, :]
        out += (tl.trans(tl.load(at, mask=n < 2 * HEADS, other=0)),)
    return out, tl.load(units + first + h, mask=h < HEADS, other=0), tl.load(middles + first + h, mask=h < HEADS, other=0)


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
