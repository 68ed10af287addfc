"""Device code of `minicache::attend` in Triton: one token a row over the stored columns of one layer. triton_attend.py launches it.

`attend_splits` gives every (row, kv head) several programs, each of which attends to a share of the columns; `combine_splits` weighs their
results by log-sum-exp. Tiles stand with columns along M and the query heads of a kv head along N (8 at least): codes are decoded in
registers, tensor cores see no padded heads beyond 8, and every head uses a decoded column.
Trap: a vector of D coordinates is a tuple of slots [columns, P], one per code of a byte (cache/codec.py), P = D / slots rounded up to 2^k.
"""
import triton
import triton.language as tl

from cache.codec import PLANES


def slots(bits: int) -> int:
    """How many coordinates a byte of the low plane holds: the number of tiles that a vector decodes to (1 where it is not coded)."""
    return 8 // PLANES[bits][0] if bits < 16 else 1


def lookup_asm(bits: int) -> tuple[str, str]:
    """PTX that decodes 4 bytes of codes at once, and its constraints. prmt looks up 4 bytes in a table of two registers.

    Operands: per slot 2 registers of two 16-bit levels each; then tables a, b (high bytes), c, d (low bytes) and the shift of the high
    plane, each given 4 times because Triton passes one per element; then 4 bytes of the low plane, and of the high plane.
    """
    n = 2 * slots(bits)
    a, b, c, d, shift, x, high = (f"${n + i}" for i in (0, 4, 8, 12, 16, 20, 21))
    code = [".reg .b32 m, s, t, h, l, p;"] + [f"shr.u32 p, {high}, {shift};"] * (bits == 3)
    if bits == 4:
        # 8 magnitudes serve 16 levels: the codes 8 .. 15 are mirrored. prmt turns a nibble with its top bit set into the sign of the byte
        # it names, here 0: so m gives 0x40 where the level is negative, and twice that is the sign bit.
        code += [f"and.b32 m, {x}, 0x88888888; shr.u32 t, m, 3; sub.u32 t, m, t; xor.b32 s, {x}, t; and.b32 s, s, 0x77777777;",
                 f"or.b32 m, {x}, 0x44444444;"]
        for half in range(2):
            code += [f"prmt.b32 h, {a}, {b}, s; prmt.b32 l, {c}, {d}, s; prmt.b32 t, 0, 0x40404040, m; mad.lo.u32 h, t, 2, h;",
                     f"prmt.b32 ${half}, l, h, 0x6240; prmt.b32 ${2 + half}, l, h, 0x7351;"]
            code += ["shr.u32 s, s, 16; shr.u32 m, m, 16;"] if half == 0 else []
    for slot in range(n // 2 if bits < 4 else 0):
        code += [f"shr.u32 t, {x}, {2 * slot}; and.b32 t, t, 0x03030303;"]
        if bits == 2:       # 4 levels of 2 bytes are one table: code c takes its bytes 2 c and 2 c + 1
            code += [f"mad.lo.u32 s, t, 0x22, 0x10101010; prmt.b32 ${2 * slot}, {a}, {b}, s; shr.u32 s, s, 16;",
                     f"prmt.b32 ${2 * slot + 1}, {a}, {b}, s;"]
        else:               # the third bit comes from the high plane; then 4 codes side by side in 16 bits are a selector
            code += [f"{'shl.b32' if slot == 0 else 'shr.u32'} m, p, {abs(2 * slot - 2)}; and.b32 m, m, 0x04040404; or.b32 t, t, m;",
                     "shr.u32 m, t, 4; or.b32 t, t, m; prmt.b32 s, t, 0, 0x4420;",
                     f"prmt.b32 h, {a}, {b}, s; prmt.b32 l, {c}, {d}, s;",
                     f"prmt.b32 ${2 * slot}, l, h, 0x5140; prmt.b32 ${2 * slot + 1}, l, h, 0x7362;"]
    return "{" + "\n".join(code) + "}", ",".join(["=r"] * n + ["r"] * 22)


@triton.jit
def load_table(levels, BITS: tl.constexpr, DTYPE: tl.constexpr):
    """The levels as four words for `lookup_asm`: high bytes, low bytes (2 bits: whole levels); of 16 levels the first half, unsigned."""
    if BITS == 2:
        i = tl.arange(0, 2)
        a = tl.sum((tl.load(levels + i).to(DTYPE).to(tl.int16, bitcast=True).to(tl.int32) & 0xffff) << 16 * i)
        b = tl.sum((tl.load(levels + 2 + i).to(DTYPE).to(tl.int16, bitcast=True).to(tl.int32) & 0xffff) << 16 * i)
        return a, b, a, b
    else:
        i = tl.arange(0, 4)
        keep: tl.constexpr = 0x7fff if BITS == 4 else 0xffff
        a = tl.load(levels + i).to(DTYPE).to(tl.int16, bitcast=True).to(tl.int32) & keep
        b = tl.load(levels + 4 + i).to(DTYPE).to(tl.int16, bitcast=True).to(tl.int32) & keep
        return (tl.sum((a >> 8) << 8 * i), tl.sum((b >> 8) << 8 * i), tl.sum((a & 255) << 8 * i), tl.sum((b & 255) << 8 * i))


@triton.jit
def load_stored(stored, column, seen, BITS: tl.constexpr, D: tl.constexpr, SLOTS: tl.constexpr, P: tl.constexpr, TURN: tl.constexpr):
    """Columns of K or V as stored: vectors ([P, BLOCK] if TURN), or the low and the high plane of their codes, [BLOCK, P] each."""
    ROW: tl.constexpr = D if BITS == 16 else D * BITS // 8
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
        high = tl.load(at + D // 4 + (j % (D // 8))[None, :], mask=here, other=0)
    return low, high


@triton.jit
def decode(packed, levels, table, BITS: tl.constexpr, D: tl.constexpr, SLOTS: tl.constexpr, DTYPE: tl.constexpr, ASM: tl.constexpr,
           CONSTRAINTS: tl.constexpr, TURN: tl.constexpr):
    """What `load_stored` gave -> a tuple of slots, [BLOCK, P] ([P, BLOCK] if TURN): by `lookup_asm`, or from memory (8 bits, fp32)."""
    low, high = packed
    out = ()
    if BITS == 16:
        out = (low,)
    else:
        # 3 bits: coordinate c has bit c div (D / 8) of byte c mod (D / 8) in the high plane: a slot takes two bits of every byte
        shift = (tl.arange(0, low.shape[1]) // (D // 8))[None, :] if BITS == 3 else 0
        if ASM == "":
            x = ()
            for slot in tl.static_range(SLOTS):
                code = (low >> slot * (8 // SLOTS)) & (2 ** (8 // SLOTS) - 1)
                if BITS == 3:
                    code |= (((high >> shift.to(tl.uint8)) >> 2 * slot) & 1) << 2
                x += (tl.load(levels + code).to(DTYPE),)
        elif BITS == 4:
            x = tl.inline_asm_elementwise(ASM, CONSTRAINTS, [table[0], table[1], table[2], table[3], shift, low, high],
                                          dtype=(tl.int16, tl.int16), is_pure=True, pack=4)
        else:
            x = tl.inline_asm_elementwise(ASM, CONSTRAINTS, [table[0], table[1], table[2], table[3], shift, low, high],
                                          dtype=(tl.int16, tl.int16, tl.int16, tl.int16), is_pure=True, pack=4)
        for slot in tl.static_range(SLOTS):
            y = x[slot] if ASM == "" else x[slot].to(DTYPE, bitcast=True)
            out += (tl.trans(y) if TURN else y,)
    return out


@triton.jit
def load_query(q, HEADS: tl.constexpr, HP: tl.constexpr, D: tl.constexpr, SLOTS: tl.constexpr, P: tl.constexpr, DTYPE: tl.constexpr):
    """The query heads of one kv head, [HEADS, D], as a tuple of slots [P, HP]."""
    h = tl.arange(0, HP)
    j = tl.arange(0, P)
    out = ()
    for slot in tl.static_range(SLOTS):
        at = q + h[None, :] * D + j[:, None] + slot * (D // SLOTS)
        out += (tl.load(at, mask=(h < HEADS)[None, :] & (j < D // SLOTS)[:, None], other=0).to(DTYPE),)
    return out


@triton.jit
def score_tile(top, total, q, k, scale, seen):
    """One tile of columns into the running softmax, base 2. top, total [HP]; q, k slots; scale, seen [BLOCK]; adds p [BLOCK, HP], fade."""
    score = tl.dot(k[0], q[0], input_precision="ieee")
    for slot in tl.static_range(1, len(k)):
        score = tl.dot(k[slot], q[slot], score, input_precision="ieee")
    score = tl.where(seen[:, None], score * scale[:, None], float("-inf"))
    new_top = tl.maximum(top, tl.max(score, 0))
    p, fade = tl.exp2(score - new_top[None, :]), tl.exp2(top - new_top)
    return new_top, total * fade + tl.sum(p, 0), p, fade


@triton.jit
def add_tile(acc, p, v, fade, DTYPE: tl.constexpr):
    """acc, v tuples of slots [P, HP], [P, BLOCK] -> acc * fade + v p."""
    p = p.to(DTYPE)
    out = ()
    for slot in tl.static_range(len(v)):
        out += (tl.dot(v[slot], p, acc[slot] * fade[None, :], input_precision="ieee"),)
    return out


@triton.jit
def store_split(partial, lse, at, top, total, acc, HEADS: tl.constexpr, HP: tl.constexpr, D: tl.constexpr, P: tl.constexpr):
    """One program's normalised sum [HEADS, D] and the log of its weight [HEADS], about -1e30 where it saw nothing."""
    h = tl.arange(0, HP)
    j = tl.arange(0, P)
    total = tl.maximum(total, 1e-30)
    tl.store(lse + at * HEADS + h, top + tl.log2(total), mask=h < HEADS)
    for slot in tl.static_range(len(acc)):
        mask = (h < HEADS)[None, :] & (j < D // len(acc))[:, None]
        to = partial + at * HEADS * D + h[None, :] * D + j[:, None] + slot * (D // len(acc))
        tl.store(to, acc[slot] / total[None, :], mask=mask)


@triton.jit
def plan_row(length, N, W, sliding_window, merged_splits, BLOCK: tl.constexpr):
    """A row's work from its length: first position seen, end of its merged columns, first tile, tiles a program, programs that have any."""
    first = tl.where(sliding_window > 0, tl.maximum(length - sliding_window + 1, 0), 0)
    end = tl.minimum(tl.maximum(length - W, 0), N)
    tile = first // BLOCK
    tiles = tl.maximum(tl.cdiv(end, BLOCK) - tile, 0)
    each = tl.maximum(tl.cdiv(tiles, merged_splits), 1)
    return first, end, tile, each, tl.cdiv(tiles, each)


@triton.jit
def attend_splits(q, q_rotated, k, v, length, k_stored, v_stored, k_magnitude, v_magnitude, exact, k_retained, v_retained, retained_pos,
                  retained_score, threshold, k_window, v_window, k_levels, v_levels, partial, lse, N, R, W, sliding_window, exact_splits,
                  G: tl.constexpr, HEADS: tl.constexpr, HP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, K_BITS: tl.constexpr,
                  V_BITS: tl.constexpr, K_SLOTS: tl.constexpr, V_SLOTS: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr,
                  K_ASM: tl.constexpr, V_ASM: tl.constexpr, K_CONSTRAINTS: tl.constexpr, V_CONSTRAINTS: tl.constexpr, SCALED: tl.constexpr,
                  MASKED: tl.constexpr, BLOCK: tl.constexpr, EXACT_BLOCK: tl.constexpr, STAGES: tl.constexpr):
    """Program (row and kv head, split): splits below `exact_splits` take retained and window slots and the new token, the others merged
    columns. Tensors as in `minicache::attend`, contiguous, `index` picked; partial [B G, splits, HEADS, D], lse [B G, splits, HEADS] fp32.
    """
    DTYPE: tl.constexpr = q.dtype.element_ty
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    n = tl.load(length + row // G).to(tl.int32)
    first, end, tile, each, active = plan_row(n, N, W, sliding_window, tl.num_programs(1) - exact_splits, BLOCK)
    scale = 1.4426950408889634 / tl.sqrt(D * 1.0)           # log2(e): the softmax is in base 2
    at = row * tl.num_programs(1) + split
    top, total = tl.full([HP], -1e30, tl.float32), tl.zeros([HP], tl.float32)       # finite: exp2(-inf - top) is 0, never nan
    if split >= exact_splits + active:
        return
    if split >= exact_splits:
        k_table, v_table = (0, 0, 0, 0), (0, 0, 0, 0)
        if K_ASM != "":
            k_table = load_table(k_levels, K_BITS, DTYPE)
        if V_ASM != "":         # levels follow from the bits, so equal bits share registers
            v_table = k_table if V_BITS == K_BITS else load_table(v_levels, V_BITS, DTYPE)
        query = load_query((q if K_BITS == 16 else q_rotated) + row * HEADS * D, HEADS, HP, D, K_SLOTS, KP, DTYPE)
        acc = ()
        for _ in tl.static_range(V_SLOTS):
            acc += (tl.zeros([VP, HP], tl.float32),)
        k_stored += row * N * (D if K_BITS == 16 else D * K_BITS // 8)
        v_stored += row * N * (D if V_BITS == 16 else D * V_BITS // 8)
        begin = (tile + (split - exact_splits) * each) * BLOCK
        for start in tl.range(begin, tl.minimum(begin + each * BLOCK, end), BLOCK, num_stages=STAGES):
            column = start + tl.arange(0, BLOCK)
            seen = (column - first).to(tl.uint32, bitcast=True) < (end - first).to(tl.uint32, bitcast=True)       # first <= column < end
            k_packed = load_stored(k_stored, column, seen, K_BITS, D, K_SLOTS, KP, False)
            v_packed = load_stored(v_stored, column, seen, V_BITS, D, V_SLOTS, VP, True)
            k_scale, v_scale = tl.full([BLOCK], 1.0, tl.float32), tl.full([BLOCK], 1.0, tl.float32)
            if SCALED:
                k_scale = tl.load(k_magnitude + row * N + column, mask=seen, other=0).to(tl.float32)
                v_scale = tl.load(v_magnitude + row * N + column, mask=seen, other=0).to(tl.float32)
            if MASKED:
                seen = seen & (tl.load(exact + row * N + column, mask=seen, other=1) == 0)
            keys = decode(k_packed, k_levels, k_table, K_BITS, D, K_SLOTS, DTYPE, K_ASM, K_CONSTRAINTS, False)
            top, total, p, fade = score_tile(top, total, query, keys, k_scale * scale, seen)
            # V is decoded only now: its tiles take the place of K's in shared memory and registers
            values = decode(v_packed, v_levels, v_table, V_BITS, D, V_SLOTS, DTYPE, V_ASM, V_CONSTRAINTS, True)
            acc = add_tile(acc, p * v_scale[:, None], values, fade, DTYPE)
        store_split(partial, lse, at, top, total, acc, HEADS, HP, D, VP)
    else:
        d = tl.arange(0, DP)
        own_query = load_query(q + row * HEADS * D, HEADS, HP, D, 1, DP, DTYPE)
        own_k = tl.load(k + row * D + d, mask=d < D, other=0).to(tl.float32)
        own_v = tl.load(v + row * D + d, mask=d < D, other=0).to(tl.float32)
        own = split == 0                                    # the new token counts once; it keeps every sum finite
        top = tl.where(own, tl.sum(own_query[0].to(tl.float32) * own_k[:, None], 0) * scale, top)
        total = tl.where(own, total + 1.0, total)
        own_acc = (tl.where(own, own_v[:, None], tl.zeros([DP, HP], tl.float32)),)
        least = tl.load(threshold + row) if R > 0 else 0.0
        for start in range(split * EXACT_BLOCK, R + W, exact_splits * EXACT_BLOCK):
            slot = start + tl.arange(0, EXACT_BLOCK)
            kept = slot < R
            ring = n - 1 - (n - 1 - (slot - R) + W) % tl.maximum(W, 1)      # the newest position before n in that slot of the window
            pos = tl.where(kept, tl.load(retained_pos + row * R + slot, mask=kept, other=0).to(tl.int32), ring)
            score = tl.load(retained_score + row * R + slot, mask=kept, other=0.0)
            counts = (slot < R + W) & (pos >= first) & ((score > least) | (slot >= R))
            if tl.max(counts.to(tl.int32), 0) > 0:            # empty slots cost their scores only
                k_at = tl.where(kept, k_retained + (row * R + slot) * D, k_window + (row * W + slot - R) * D)
                v_at = tl.where(kept, v_retained + (row * R + slot) * D, v_window + (row * W + slot - R) * D)
                tile_k = tl.load(k_at[:, None] + d[None, :], mask=counts[:, None] & (d < D)[None, :], other=0)
                tile_v = tl.load(v_at[None, :] + d[:, None], mask=counts[None, :] & (d < D)[:, None], other=0)
                same = tl.full([EXACT_BLOCK], scale, tl.float32)
                top, total, own_p, own_fade = score_tile(top, total, own_query, (tile_k,), same, counts)
                own_acc = add_tile(own_acc, own_p, (tile_v,), own_fade, DTYPE)
        store_split(partial, lse, at, top, total, own_acc, HEADS, HP, D, DP)


@triton.jit
def combine_splits(partial, lse, length, y, y_rotated, N, W, sliding_window, exact_splits, n_splits, G: tl.constexpr, HEADS: tl.constexpr,
                   D: tl.constexpr, DP: tl.constexpr, V_CODED: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr, TILE: tl.constexpr):
    """Program (row and kv head, query head): the splits' sums by their weights; what stands in the rotated basis goes to y_rotated."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    n = tl.load(length + row // G).to(tl.int32)
    _, _, _, _, active = plan_row(n, N, W, sliding_window, n_splits - exact_splits, BLOCK)
    used = exact_splits + active
    lse += row * n_splits * HEADS + head
    partial += (row * n_splits * HEADS + head) * D
    s, d = tl.arange(0, SPLITS), tl.arange(0, DP)
    weight = tl.load(lse + s * HEADS, mask=s < used, other=float("-inf"))
    top = tl.max(weight, 0)
    total = tl.sum(tl.exp2(weight - top), 0)
    plain, rotated = tl.zeros([DP], tl.float32), tl.zeros([DP], tl.float32)
    for start in range(0, used, TILE):
        t = start + tl.arange(0, TILE)
        weight_t = tl.exp2(tl.load(lse + t * HEADS, mask=t < used, other=float("-inf")) - top) / total
        x = tl.load(partial + t[:, None] * HEADS * D + d[None, :], mask=(t < used)[:, None] & (d < D)[None, :], other=0) * weight_t[:, None]
        merged = (t >= exact_splits)[:, None] & V_CODED
        plain += tl.sum(tl.where(merged, 0.0, x), 0)
        rotated += tl.sum(tl.where(merged, x, 0.0), 0)
    out = (row * HEADS + head) * D + d
    tl.store(y + out, plain, mask=d < D)
    tl.store(y_rotated + out, rotated, mask=d < D)
