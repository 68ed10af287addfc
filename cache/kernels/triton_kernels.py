"""Device code of `minicache::attend` in Triton: one token a row over the stored columns of one layer. triton_attend.py launches it.

`attend_splits` gives every (row, kv head) several programs, each of which attends to a share of the columns; `combine_splits` weighs their
results by log-sum-exp. Tiles stand with columns along M and the query heads of a kv head along N (8 at least): codes are decoded in
registers, tensor cores see no padded heads beyond 8, and every head uses a decoded column. A vector is a tuple of slots: triton_codes.py.
Trap: Triton puts the change of a loaded tensor's layout right after its load, where the warp then waits: what is loaded in one layout and
used in another is converted late, or used by the next turn of the loop.
"""
import triton
import triton.language as tl

from cache.kernels.triton_codes import BASE, MIDDLE, grid_step, k_coordinates, v_coordinates
from cache.kernels.triton_operands import (
    coarse_and_fine,
    decode,
    decode_k,
    decode_v,
    deinterleave,
    exact_coordinates,
    interleave,
    load_exact,
    load_k,
    load_query,
    load_query_numbers,
    load_stored,
    load_v,
    to_numbers,
)


@triton.jit
def products(q, k):
    """Slots of q [P, N] and k [BLOCK, P] -> their products [BLOCK, N], int32 of int8."""
    KIND: tl.constexpr = tl.int32 if k[0].dtype == tl.int8 else tl.float32
    out = tl.dot(k[0], q[0], input_precision="ieee", out_dtype=KIND)
    for slot in tl.static_range(1, len(k)):
        out = tl.dot(k[slot], q[slot], out, input_precision="ieee", out_dtype=KIND)
    return out


@triton.jit
def online_softmax(top, score, seen):
    """A tile of scores [BLOCK, HP] into the running softmax, base 2: its maximum [HP], p [BLOCK, HP], what earlier sums fade by [HP]."""
    score = tl.where(seen[:, None], score, float("-inf"))
    new_top = tl.maximum(top, tl.max(score, 0))
    return new_top, tl.exp2(score - new_top[None, :]), tl.exp2(top - new_top)


@triton.jit
def add_tile(acc, p, v, fade):
    """acc, v tuples of slots [P, N], [P, BLOCK] -> acc * fade + v p."""
    out = ()
    for slot in tl.static_range(len(v)):
        out += (tl.dot(v[slot], p, acc[slot] * fade[None, :], input_precision="ieee"),)
    return out


@triton.jit
def two_parts(p):
    """p [BLOCK, HP] fp32 -> [BLOCK, 2 HP] bf16: what 8 bits hold of it, and what they leave, side by side."""
    coarse = (p.to(tl.uint32, bitcast=True) & 0xffff0000).to(tl.float32, bitcast=True)
    return interleave(coarse, p - coarse).to(tl.bfloat16)


@triton.jit
def store_split(partial, lse, at, top, total, acc, HEADS: tl.constexpr, HP: tl.constexpr, D: tl.constexpr, P: tl.constexpr,
                BITS: tl.constexpr, NUMBERS: tl.constexpr):
    """One program's normalised sum [HEADS, D] and the log of its weight [HEADS], about -1e30 where it saw nothing."""
    h = tl.arange(0, HP)
    total = tl.maximum(total, 1e-30)
    tl.store(lse + at * HEADS + h, top + tl.log2(total), mask=h < HEADS)
    for slot in tl.static_range(len(acc)):
        d = v_coordinates(slot, P, D, BITS, NUMBERS)
        mask = (h < HEADS)[None, :] & (d < D)[:, None]
        tl.store(partial + at * HEADS * D + h[None, :] * D + d[:, None], acc[slot] / total[None, :], mask=mask)


@triton.jit
def plan_row(length, N, W, sliding_window, merged_splits, BLOCK: tl.constexpr):
    """A row's work from its length: first position seen, end of its merged columns, first tile, tiles a program, programs that have any (1
    at least)."""
    first = tl.where(sliding_window > 0, tl.maximum(length - sliding_window + 1, 0), 0)
    end = tl.minimum(tl.maximum(length - W, 0), N)
    tile = first // BLOCK
    tiles = tl.maximum(tl.cdiv(end, BLOCK) - tile, 0)
    each = tl.maximum(tl.cdiv(tiles, merged_splits), 1)
    return first, end, tile, each, tl.maximum(tl.cdiv(tiles, each), 1)


@triton.jit
def attend_splits(q, q_rotated, q_unit, q_middle, k, v, length, k_stored, v_stored, k_magnitude, v_magnitude, exact, k_retained, v_retained,
                  retained_pos, retained_score, threshold, k_window, v_window, k_levels, v_levels, partial, lse, v_row, N, R, W,
                  sliding_window, exact_splits, G: tl.constexpr, HEADS: tl.constexpr, HP: tl.constexpr, HE: tl.constexpr, D: tl.constexpr,
                  DP: tl.constexpr, K_BITS: tl.constexpr, V_BITS: tl.constexpr, K_SLOTS: tl.constexpr, V_SLOTS: tl.constexpr,
                  KP: tl.constexpr, VP: tl.constexpr, K_NUMBERS: tl.constexpr, V_NUMBERS: tl.constexpr, SCALED: tl.constexpr,
                  MASKED: tl.constexpr, BY_THRESHOLD: tl.constexpr, OWN: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr,
                  EXACT_BLOCK: tl.constexpr, STAGES: tl.constexpr):
    """Program (row and kv head, split): splits below `exact_splits` take retained and window slots and the new token, the others merged
    columns. Tensors as in `minicache::attend`, `index` picked, contiguous but for v's rows; partial [B G, splits, HEADS, D] and lse [B G,
    splits, HEADS]. HP, HE: heads, padded, in merged and in exact columns. OWN: no exact columns, the first split takes the new token.
    """
    DTYPE: tl.constexpr = q.dtype.element_ty
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    n = tl.load(length + row // G).to(tl.int32)
    first, end, tile, each, active = plan_row(n, N, W, sliding_window, tl.num_programs(1) - exact_splits, BLOCK)
    scale = 1.4426950408889634 / tl.sqrt(D * 1.0)           # log2(e): the softmax is in base 2
    at = row * tl.num_programs(1) + split
    if split >= exact_splits + active:
        return
    if split >= exact_splits:
        if K_NUMBERS:
            query, unit, middle = load_query_numbers(q_rotated, q_unit, q_middle, row * HEADS, HEADS, HP, K_SLOTS, KP)
        else:
            own_q = (q if K_BITS == 16 else q_rotated) + row * HEADS * D
            query, unit, middle = load_query(own_q, HEADS, HP, D, K_BITS, K_SLOTS, KP, DTYPE), tl.full([HP], 1.0, tl.float32), 0
        unit *= scale
        top = tl.full([HP], -1e30, tl.float32)              # finite: exp2(-inf - top) is 0, never nan
        ROWS: tl.constexpr = BLOCK if V_NUMBERS else 1      # of numbers the columns are added up at the end
        totals, weights = tl.zeros([ROWS, HP], tl.float32), tl.zeros([BLOCK, HP], tl.float32)       # of p, and of p |v|
        acc = ()
        for _ in tl.static_range(V_SLOTS):
            acc += (tl.zeros([VP, 2 * HP if V_NUMBERS else HP], tl.float32),)
        k_stored += row * N * (D if K_BITS == 16 else D * K_BITS // 8)
        v_stored += row * N * (D if V_BITS == 16 else D * V_BITS // 8)
        begin, room = (tile + (split - exact_splits) * each) * BLOCK, tl.maximum(N - BLOCK, 0)
        # where K and V become numbers a tile's V waits until the next tile's K is under way: loads have long begun when they are used, and
        # the products of one tile fill the gaps of the other's
        LATER: tl.constexpr = K_NUMBERS and V_NUMBERS
        parts, fade = tl.zeros([BLOCK, 2 * HP], tl.bfloat16), tl.full([HP], 1.0, tl.float32)
        if OWN:             # begun here, used behind the loop
            new_k = tl.load(k + row * D + tl.arange(0, KP), mask=tl.arange(0, KP) < D, other=0)
            new_v = tl.load(v + row // G * v_row + row % G * D + tl.arange(0, VP), mask=tl.arange(0, VP) < D, other=0)
        if LATER:
            v_packed = load_v(v_stored, tl.minimum(begin, room), N, V_BITS, D, BLOCK, WHOLE)
        for start in tl.range(begin, tl.minimum(begin + each * BLOCK, end), BLOCK, num_stages=STAGES):
            origin = tl.minimum(start, room)                # the last tile may begin before its first column: it reads nothing past N
            column = origin + tl.arange(0, BLOCK)
            seen = (column >= tl.maximum(start, first)) & (column < end)
            if K_NUMBERS:
                k_packed = load_k(k_stored, origin, N, K_BITS, D, KP, BLOCK, WHOLE)
            else:
                k_packed = load_stored(k_stored, column, seen, K_BITS, D, K_SLOTS, KP, False)
            if SCALED:
                k_scale = tl.load(k_magnitude + row * N + column, mask=seen, other=0)
                v_scale = tl.load(v_magnitude + row * N + column, mask=seen, other=0)
            if MASKED:
                seen = seen & (tl.load(exact + row * N + column, mask=seen, other=1) == 0)
            if LATER:
                acc = add_tile(acc, parts, decode_v(v_packed, V_BITS, V_SLOTS), interleave(fade, fade))
            if V_NUMBERS:
                v_packed = load_v(v_stored, origin, N, V_BITS, D, BLOCK, WHOLE)
            else:
                v_packed = load_stored(v_stored, column, seen, V_BITS, D, V_SLOTS, VP, True)
            if K_NUMBERS:
                score = (coarse_and_fine(products(query, decode_k(k_packed, D, K_BITS))) - middle[None, :]).to(tl.float32)
            else:
                score = products(query, decode(k_packed, k_levels, K_BITS, D, K_SLOTS, DTYPE, False))
            score *= unit[None, :]
            if SCALED:
                score *= k_scale.to(tl.float32)[:, None]
            top, p, fade = online_softmax(top, score, seen)
            totals = totals * fade[None, :] + (p if V_NUMBERS else tl.sum(p, 0)[None, :])
            if SCALED:
                p *= v_scale.to(tl.float32)[:, None]
            if V_NUMBERS:
                weights = weights * fade[None, :] + p
                parts = two_parts(p)
                if not LATER:
                    acc = add_tile(acc, parts, decode_v(v_packed, V_BITS, V_SLOTS), interleave(fade, fade))
            else:           # V is decoded only now: its tiles take the place of K's in shared memory and registers
                acc = add_tile(acc, p.to(DTYPE), decode(v_packed, v_levels, V_BITS, D, V_SLOTS, DTYPE, True), fade)
        if LATER:
            acc = add_tile(acc, parts, decode_v(v_packed, V_BITS, V_SLOTS), interleave(fade, fade))
        if OWN:
            new_score = tl.sum(query[0].to(tl.float32) * new_k.to(tl.float32)[:, None], 0) * scale
            top, p, fade = online_softmax(top, new_score[None, :], tl.full([1], 0, tl.int32) == split)
            totals = totals * fade[None, :] + p
            acc = (acc[0] * fade[None, :] + new_v.to(tl.float32)[:, None] * p,)
        sums = acc
        if V_NUMBERS:
            STEP: tl.constexpr = grid_step(V_BITS)
            weight = tl.sum(weights, 0) * (BASE + MIDDLE)
            sums = ()
            for slot in tl.static_range(V_SLOTS):
                coarse, fine = deinterleave(acc[slot])
                sums += ((coarse + fine - weight[None, :]) * STEP,)
        store_split(partial, lse, at, top, tl.sum(totals, 0), sums, HEADS, HP, D, VP, V_BITS, V_NUMBERS)
    else:
        d = tl.arange(0, DP)
        head = tl.minimum(tl.arange(0, HE), HEADS - 1)          # pads: the last one
        own_query, order = (tl.trans(load_exact(q + (row * HEADS + head) * D, D, DP)),), exact_coordinates(DP)
        own_k = tl.load(k + row * D + order, mask=order < D, other=0).to(tl.float32)
        own_v = tl.load(v + row // G * v_row + row % G * D + d, mask=d < D, other=0).to(tl.float32)
        own = split == 0                                    # the new token counts once; it keeps every sum finite
        own_score = tl.sum(own_query[0].to(tl.float32) * own_k[:, None], 0) * scale
        own_top = tl.where(own, own_score, tl.full([HE], -1e30, tl.float32))
        total = tl.where(own, tl.full([HE], 1.0, tl.float32), tl.zeros([HE], tl.float32))
        own_acc = (tl.where(own, own_v[:, None], tl.zeros([DP, HE], tl.float32)),)
        least = tl.load(threshold + row) if BY_THRESHOLD else float("-inf")
        newest = (n - 1 + W) % tl.maximum(W, 1)             # slot of the window
        for start in range(split * EXACT_BLOCK, R + W, exact_splits * EXACT_BLOCK):
            slot = start + tl.arange(0, EXACT_BLOCK)
            kept = slot < R
            ring = n - 1 - newest + slot - R - tl.where(slot - R > newest, W, 0)    # the newest position before n in that slot
            pos = tl.where(kept, tl.load(retained_pos + row * R + slot, mask=kept, other=0).to(tl.int32), ring)
            kept_score = tl.load(retained_score + row * R + slot, mask=kept, other=0.0)
            counts = (slot < R + W) & (pos >= first) & ((kept_score > least) | (slot >= R))
            if tl.max(counts.to(tl.int32), 0) > 0:            # empty slots cost their scores only
                there = tl.minimum(slot, R + W - 1)           # what does not count is read, too: it weighs nothing
                k_at = tl.where(there < R, k_retained + (row * R + there) * D, k_window + (row * W + there - R) * D)
                v_at = tl.where(there < R, v_retained + (row * R + there) * D, v_window + (row * W + there - R) * D)
                tile_k = load_exact(k_at, D, DP)
                tile_v = tl.load(v_at[None, :] + d[:, None], mask=(d < D)[:, None], other=0)
                own_top, own_p, own_fade = online_softmax(own_top, products(own_query, (tile_k,)) * scale, counts)
                total = total * own_fade + tl.sum(own_p, 0)
                own_acc = add_tile(own_acc, own_p.to(DTYPE), (tile_v,), own_fade)
        store_split(partial, lse, at, own_top, total, own_acc, HEADS, HE, D, DP, 16, False)


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
    if V_CODED:
        tl.store(y_rotated + out, rotated, mask=d < D)


# -- to and from the rotated basis: 16 vectors a program, so that the rotation is read once for 16. Its elements have one magnitude; over
# that they are 1 and -1, exact in 16 bits, and so are their products with what has 16 bits ----------------------------------------------
@triton.jit
def rotate(q, rotation, q_rotated, q_unit, q_middle, count, D: tl.constexpr, DP: tl.constexpr, STEP: tl.constexpr, WIDE: tl.constexpr,
           K_BITS: tl.constexpr, K_NUMBERS: tl.constexpr, KP: tl.constexpr, WIDTH: tl.constexpr):
    """q [count, D] @ rotation [D, D] -> q_rotated [count, D] fp32; or what `load_query_numbers` wants: [count, 2, WIDTH] int8, q_unit and
    q_middle [count]."""
    i, j = tl.program_id(0).to(tl.int64) * 16 + tl.arange(0, 16)[:, None], tl.arange(0, WIDTH)
    d = (k_coordinates(j, KP, D, K_BITS, True) if K_NUMBERS else j)[None, :]
    sums, over = tl.zeros([16, WIDTH], tl.float32), 1.0 if WIDE else 1 / tl.abs(tl.load(rotation))
    for start in tl.static_range(0, DP, STEP):
        c = start + tl.arange(0, STEP)
        part = tl.load(q + i * D + c[None, :], mask=(i < count) & (c < D)[None, :], other=0)
        turn = tl.load(rotation + c[:, None] * D + d, mask=(c < D)[:, None] & (d < D), other=0) * over
        sums = tl.dot(part, turn.to(part.dtype), sums, input_precision="ieee")
    sums /= over
    if K_NUMBERS:
        coarse, fine, unit = to_numbers(sums)
        at, row = q_rotated + i * (2 * WIDTH) + j[None, :], tl.program_id(0) * 16 + tl.arange(0, 16)
        tl.store(at, coarse.to(tl.int8), mask=i < count)
        tl.store(at + WIDTH, fine.to(tl.int8), mask=i < count)
        tl.store(q_unit + row, unit * grid_step(K_BITS), mask=row < count)
        tl.store(q_middle + row, tl.sum((coarse * 128 + fine).to(tl.int32), 1) * MIDDLE, mask=row < count)
    else:
        tl.store(q_rotated + i * D + d, sums, mask=(i < count) & (d < D))


@triton.jit
def combine_and_rotate(partial, lse, length, rotation, y, count, N, W, sliding_window, exact_splits, n_splits, G: tl.constexpr,
                       HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr,
                       STEP: tl.constexpr, WIDE: tl.constexpr):
    """`combine_splits` for 16 of the `count` query heads, of few splits, and back to the basis of the exact columns: y [count, D]."""
    i, d, s = tl.program_id(0) * 16 + tl.arange(0, 16), tl.arange(0, DP)[None, :], tl.arange(0, SPLITS)[None, :]
    row, here = (i // HEADS).to(tl.int64), i < count
    n = tl.load(length + row // G, mask=here, other=0).to(tl.int32)
    _, _, _, _, active = plan_row(n, N, W, sliding_window, n_splits - exact_splits, BLOCK)
    used = (s < (exact_splits + active)[:, None]) & here[:, None]
    at = (row * n_splits * HEADS + i % HEADS)[:, None] + s * HEADS
    weight = tl.load(lse + at, mask=used, other=-1e30)
    weight = tl.where(used, tl.exp2(weight - tl.max(weight, 1)[:, None]), 0.0)
    weight /= tl.maximum(tl.sum(weight, 1), 1e-30)[:, None]
    sums = tl.zeros([16, DP], tl.float32)
    for split in range(exact_splits):
        own = tl.sum(tl.where(s == split, at, 0), 1)[:, None] * D + d
        sums += tl.load(partial + own, mask=here[:, None] & (d < D), other=0) * tl.sum(tl.where(s == split, weight, 0.0), 1)[:, None]
    merged, turned, over = used & (s >= exact_splits), tl.zeros([16, DP], tl.float32), 1.0 if WIDE else 1 / tl.abs(tl.load(rotation))
    for start in tl.static_range(0, DP, STEP):
        c = start + tl.arange(0, STEP)
        part = tl.load(partial + at[:, :, None] * D + c[None, None, :], mask=merged[:, :, None] & (c < D)[None, None, :], other=0)
        turn = tl.load(rotation + d * D + c[:, None], mask=(c < D)[:, None] & (d < D), other=0) * over
        part = tl.sum(part * weight[:, :, None], 1)
        if WIDE:
            turned = tl.dot(part, turn, turned, input_precision="ieee")
        else:               # two halves of a sum, 16 bits in all
            high, turn = part.to(tl.bfloat16), turn.to(tl.bfloat16)
            turned = tl.dot((part - high.to(tl.float32)).to(tl.bfloat16), turn, tl.dot(high, turn, turned))
    sums += turned / over
    tl.store(y + i.to(tl.int64)[:, None] * D + d, sums, mask=here[:, None] & (d < D))
