"""`minicache::commit` on CUDA. Written: what cache/split.py, merge.py and codec.py say.

`commit_triton` has the operator's arguments and writes the buffers in place; no host sync. Two launches: `store` merges and codes blocks of
vectors, so that the rotation is read once for a block; `keep` retains and moves the window, a (row, kv head) a program. Of a prompt `store`
alone runs, by `store_triton`; SplitGroup does the rest.
Traps: `store` reads the token that leaves from the window slot that `keep` overwrites. All threads of a program load its scalars and one
writes them: what is written in place is read before a barrier, or by its writer.
"""
import torch
import triton
import triton.language as tl
from torch import Tensor

from cache.kernels.triton_geometry import TINY, angle_between, weigh

SINK = tl.constexpr(2.0)            # cache/split.py
LIFT = tl.constexpr(4096.0)         # brings both halves of a unit vector's coordinates into fp16's normal range
FEW = 2048                          # up to so many (row, kv head)s small blocks, and the rotation in large strips


@triton.jit
def apart(x):
    """x [BLOCK], a lane each: in the layout of a sum over vectors, all lanes that share a vector would compute the same."""
    return tl.gather(x, tl.arange(0, x.shape[0]), 0)


@triton.jit
def read(x, i, mask, D: tl.constexpr):
    """Coordinates i [I] of the vectors at x [BLOCK] -> [BLOCK, I] fp64."""
    return tl.load(x[:, None] + i[None, :], mask=mask[:, None] & (i < D)[None, :], other=0).to(tl.float64)


@triton.jit
def mix(x, y, w0, w1, i, mask, D: tl.constexpr):
    """Coordinates i of w0 x + w1 y, in fp32; y None: of w0 x."""
    z = w0[:, None] * read(x, i, mask, D)
    if y is not None:
        z += w1[:, None] * read(y, i, mask, D)
    return z.to(tl.float32)


@triton.jit
def pack(target, code, mask, EACH: tl.constexpr, WIDTH: tl.constexpr):
    """One plane of cache/codec.py: code [BLOCK, P, SLOTS] of WIDTH bits, coordinate s EACH + i at [i, s]. A wide plane: several stores."""
    PARTS: tl.constexpr = code.shape[2] * WIDTH // 8
    i, slot = tl.arange(0, code.shape[1])[None, :], tl.arange(0, code.shape[2])[None, None, :]
    for part in tl.static_range(PARTS):
        byte = tl.sum(tl.where(slot % PARTS == part, code << slot // PARTS * WIDTH, 0), 2)
        tl.store(target[:, None] + (part * EACH + i), byte.to(tl.uint8), mask=mask[:, None] & (i < EACH))


@triton.jit
def put(x, y, w0, w1, mask, target, levels, rotation, BITS: tl.constexpr, D: tl.constexpr, DEPTH: tl.constexpr):
    """The unit directions w0 x + w1 y into `target`, as they are or as codes. Returns the lengths that they decode to, 1 if as they are."""
    DP: tl.constexpr = triton.next_power_of_2(D)
    n = tl.arange(0, DP)
    if BITS == 16:
        unit = mix(x, y, w0, w1, n, mask, D).to(target.dtype.element_ty)
        tl.store(target[:, None] + n[None, :], unit, mask=mask[:, None] & (n < D)[None, :])
        return tl.full([x.shape[0]], 1, tl.float32)
    else:
        # 1. rotate, as exactly as in fp32: the rotation's elements have one magnitude, so that fp16 changes them by one factor, and two
        # halves in fp16 hold a coordinate. Column n of the product is slot n % SLOTS of byte n // SLOTS of the narrowest plane
        SLOTS: tl.constexpr = 8 if BITS == 3 else 8 // BITS
        EACH: tl.constexpr = D // SLOTS
        column, there = n % SLOTS * EACH + n // SLOTS, n // SLOTS < EACH
        rotated = tl.zeros([x.shape[0], DP], tl.float32)
        for start in range(0, D, DEPTH):
            row = start + tl.arange(0, DEPTH)
            strip = tl.load(rotation + (row[:, None] * D + column[None, :]), mask=(row < D)[:, None] & there[None, :], other=0)
            unit = mix(x, y, w0, w1, row, mask, D) * LIFT
            high = unit.to(tl.float16)
            rotated = tl.dot(high, strip.to(tl.float16), rotated)
            rotated = tl.dot((unit - high.to(tl.float32)).to(tl.float16), strip.to(tl.float16), rotated)
        rotated *= 1 / (LIFT * tl.abs(tl.load(rotation).to(tl.float16).to(tl.float32)))
        # 2. encode: how many cuts lie below; the levels are symmetric
        HALF: tl.constexpr = 2 ** BITS // 2
        code, size = tl.zeros([x.shape[0], DP], tl.int32), tl.abs(rotated)
        if BITS == 8:
            for bit in tl.static_range(BITS - 2, -1, -1):
                level = levels + HALF + code + (1 << bit)
                code += tl.where(size > (tl.load(level) + tl.load(level - 1)) * 0.5, 1 << bit, 0)
            level = tl.load(levels + HALF + code)
        else:
            last = tl.load(levels + HALF)
            level = last + size * 0
            for i in tl.static_range(1, HALF):
                farther = tl.load(levels + HALF + i)
                above = size > (farther + last) * 0.5
                code, level, last = tl.where(above, i, code), tl.where(above, farther, level), farther
        code = tl.where(rotated > 0, HALF + code, HALF - 1 - code)
        # 3. pack
        code = tl.reshape(code, [x.shape[0], DP // SLOTS, SLOTS])
        if BITS == 3:
            pack(target, code & 3, mask, EACH, 2)
            pack(target + D // 4, code >> 2, mask, EACH, 1)
        else:
            pack(target, code, mask, EACH, BITS)
        return tl.sqrt(tl.sum(tl.where(there[None, :], level * level, 0), 1))


@triton.jit
def put_magnitude(target, along, length, mask):
    most: tl.constexpr = 65504.0 if target.dtype.element_ty == tl.float16 else 3.4028234663852886e38
    tl.store(target, tl.minimum(tl.maximum(along.to(tl.float32) / length, -most), most).to(target.dtype.element_ty), mask=mask)


@triton.jit
def merge(x, member, direction, magnitude, levels, rotation, far, column, columns, m, BITS: tl.constexpr, OWN: tl.constexpr,
          D: tl.constexpr, RULE: tl.constexpr, PROJECTION: tl.constexpr, T: tl.constexpr, SCORED: tl.constexpr, DEPTH: tl.constexpr):
    """K or V of tokens, vector l at x [BLOCK] + l member, into columns `column` [BLOCK] (-1: none) + l columns; stored alone, the m-th."""
    # a mask for K and V together, made outside, upsets the layouts of Triton 3.7 where K has 16 bits
    d, mask = tl.arange(0, triton.next_power_of_2(D)), column >= 0
    if OWN:
        x, column = x + m * member, column + m * columns
        x0 = read(x, d, mask, D)
        along0 = tl.sqrt(tl.sum(x0 * x0, 1))
        y, w0, w1 = None, 1 / tl.maximum(along0, TINY), None
    else:
        y = x + member
        x0, x1 = read(x, d, mask, D), read(y, d, mask, D)
        a, b, c = apart(tl.sum(x0 * x0, 1)), apart(tl.sum(x1 * x1, 1)), apart(tl.sum(x0 * x1, 1))
        angle = angle_between(a, b, c)
        if SCORED:                                  # by pi in fp32, as the reference
            tl.store(far, (angle.to(tl.float32).to(tl.float64) / 3.1415927410125732).to(tl.float32), mask=mask)
        w0, w1 = weigh(a, b, c, angle, RULE, PROJECTION, T)
        parts = w0 * w0 * a + w1 * w1 * b           # where the two cancel, no digit of their sum's length is left
        by = 1 / tl.maximum(tl.sqrt(tl.maximum(parts + 2 * (w0 * w1 * c), 1e-15 * parts)), TINY)
        w0, w1 = w0 * by, w1 * by
        along0, along1 = (w0 * a + w1 * c, w0 * c + w1 * b) if PROJECTION else (tl.sqrt(a), tl.sqrt(b))
        w0, w1, along0, along1 = apart(w0), apart(w1), apart(along0), apart(along1)
    direction += column * (D if BITS == 16 else D * BITS // 8)
    length = put(x, y, w0, w1, mask, direction, levels, rotation, BITS, D, DEPTH)
    put_magnitude(magnitude + column, along0, length, mask)
    if not OWN:
        put_magnitude(magnitude + column + columns, along1, length, mask)


@triton.jit
def store(k, v, length, n_new, rows, k_direction, v_direction, k_magnitude, v_magnitude, k_window, v_window, rotation, k_levels, v_levels,
          far, count, heads, tokens, N, G: tl.constexpr, W: tl.constexpr, D: tl.constexpr, K_BITS: tl.constexpr, V_BITS: tl.constexpr,
          K_OWN: tl.constexpr, V_OWN: tl.constexpr, RULE: tl.constexpr, PROJECTION: tl.constexpr, T: tl.constexpr, SLOTS: tl.constexpr,
          CHOSEN: tl.constexpr, BLOCK: tl.constexpr, DEPTH: tl.constexpr):
    """Program (BLOCK of the `count` (row, kv head, token)s, K or V of a member). Tensors as of `minicache::commit`, contiguous; rows where
    CHOSEN; far [2, count]: distances. Token t is the t-th that leaves the window, from the ring or already of the new ones."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    token, head, row = i % tokens, i // tokens % G, i // tokens // G
    n, new = tl.load(length + row, mask=i < count, other=0).to(tl.int32), tl.load(n_new + row, mask=i < count, other=0).to(tl.int32)
    pos = tl.maximum(n - W, 0) + token
    if CHOSEN:
        row = tl.load(rows + row, mask=i < count, other=0).to(tl.int32)
    head, leaves = (row * G + head).to(tl.int64), (i < count) & (pos < n + new - W)
    column = tl.where(leaves, head * N + tl.minimum(pos, N - 1), -1)
    if tl.max(column, 0) < 0:
        return
    columns, m = tl.cast(heads, tl.int64) * N, tl.program_id(1) // 2
    own = (i - token + pos - n).to(tl.int64) * D
    k, v, member = k + own, v + own, tl.cast(count, tl.int64) * D
    if W > 0:
        ring, stored = (head * W + pos % W) * D, pos < n
        k, v = tl.where(stored, k_window + ring, k), tl.where(stored, v_window + ring, v)
        member = tl.where(stored, tl.cast(heads, tl.int64) * W * D, member)
    if tl.program_id(1) % 2 == 0:
        if K_OWN or m == 0:
            merge(k, member, k_direction, k_magnitude, k_levels, rotation, far + i, column, columns, m, K_BITS, K_OWN, D, RULE, PROJECTION,
                  T, SLOTS > 0, DEPTH)
    elif V_OWN or m == 0:
        merge(v, member, v_direction, v_magnitude, v_levels, rotation, far + count + i, column, columns, m, V_BITS, V_OWN, D, RULE,
              PROJECTION, T, SLOTS > 0, DEPTH)


@triton.jit
def threshold(least, most, gamma):
    """SplitGroup.threshold bit for bit: the launch forbids that the product is fused into the sum."""
    return tl.where(most >= least, tl.minimum(most - gamma * (most - least), 1.0), 1.0)


@triton.jit
def keep(k, v, length, n_new, exact, k_retained, v_retained, retained_pos, retained_score, score_range, overflow, k_window, v_window, far,
         k_member, k_row, v_member, v_row, N, R, sinks, gamma, G: tl.constexpr, W: tl.constexpr, D: tl.constexpr, MEMBERS: tl.constexpr,
         K_OWN: tl.constexpr, V_OWN: tl.constexpr, RETENTION: tl.constexpr, SLOTS: tl.constexpr):
    """Program (row and kv head): the R largest scores so far, and the window. Arguments as of `store`; members and rows of k and v lie as
    their strides say."""
    head, heads = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    some, n = tl.load(n_new + head // G), tl.load(length + head // G).to(tl.int32)
    if some == 0:
        return
    member, d = tl.arange(0, MEMBERS)[:, None].to(tl.int64), tl.arange(0, triton.next_power_of_2(D))[None, :]
    at, own = member * heads + head, head % G * D + d
    real = at * 0 + d < D
    k, v = k + member * k_member + head // G * k_row + own, v + member * v_member + head // G * v_row + own
    new_k, new_v = tl.load(k, mask=real, other=0), tl.load(v, mask=real, other=0)
    if W > 0:
        ring = (at * W + n % W) * D + d
        k, v = k_window + ring, v_window + ring
    if SLOTS > 0:
        if n >= W:
            # 1. the worst slot, which goes if the token that leaves is better; of equally bad ones the newest
            to, slot = head * N + tl.minimum(n - W, N - 1), tl.arange(0, SLOTS)
            scores = tl.load(retained_score + head * R + slot, mask=slot < R, other=float("inf"))
            positions = tl.load(retained_pos + head * R + slot, mask=slot < R, other=-1)
            worst_score = tl.min(scores, 0)
            old = tl.max(tl.where(scores == worst_score, positions, -1), 0)
            worst = tl.min(tl.where((scores == worst_score) & (positions == old), slot, R), 0)
            # 2. the token's score, and the threshold before and after it
            sink, score, before, least = n - W < sinks, float("-inf"), float("-inf"), float("-inf")
            if not (K_OWN and V_OWN):
                score = 0.0 if K_OWN else tl.load(far + head)
                score = score if V_OWN else (score + tl.load(far + heads + head)) * (1.0 if K_OWN else 0.5)
                score = -score if RETENTION == "literal" else score
                low, high = tl.load(score_range + head * 2), tl.load(score_range + head * 2 + 1)
                new_low, new_high = tl.where(sink, low, tl.minimum(low, score)), tl.where(sink, high, tl.maximum(high, score))
                if RETENTION != "topk":
                    before, least = threshold(low, high, gamma), threshold(new_low, new_high, gamma)
            score = tl.where(sink, SINK, score)
            wins = score > worst_score
            # 3. writing: no thread is still reading
            tl.debug_barrier()
            if not (K_OWN and V_OWN):
                tl.store(score_range + head * 2, new_low)
                tl.store(score_range + head * 2 + 1, new_high)
                if RETENTION != "topk":
                    tl.store(overflow + head, tl.load(overflow + head) + tl.where(tl.minimum(score, worst_score) > least, 1, 0))
                    if least != before:         # the winner's slot is written below
                        tl.store(exact + head * N + positions, scores > least, mask=(slot < R) & ((slot != worst) | (wins == 0)))
            if wins:
                tl.store(exact + head * N + old, False)
                tl.store(exact + to, score > least)
                tl.store(retained_score + head * R + worst, score)
                tl.store(retained_pos + head * R + worst, tl.minimum(n - W, N - 1))
                tl.store(k_retained + (at * R + worst) * D + d, tl.load(k, mask=real, other=0), mask=real)
                tl.store(v_retained + (at * R + worst) * D + d, tl.load(v, mask=real, other=0), mask=real)
    if W > 0:
        tl.debug_barrier()                      # the token that leaves was read from the slot that is written now
        tl.store(k, new_k, mask=real)
        tl.store(v, new_v, mask=real)


def commit_triton(*arguments: Tensor | int | float | str) -> None:
    """The operator (see cache/kernels/__init__.py), for a step's tokens. Buffers are contiguous."""
    assert arguments[4] is None and arguments[0].shape[3] == 1, "a prompt's tokens: store_triton"
    with torch.cuda.device_of(arguments[0]):
        for kernel, grid, named, options in launches(*arguments):
            kernel[grid](**named, **options)


def store_triton(*arguments: Tensor | int | float | str) -> Tensor:
    """The operator's merged columns alone, of any tokens and rows -> distances [2, B', G, T] fp32 of K and V ([0, ..] without slots)."""
    kernel, grid, named, options = launches(*arguments)[0]
    with torch.cuda.device_of(arguments[0]):
        kernel[grid](**named, **options)
    return named["far"].view(-1, *arguments[0].shape[1:4])


def launches(*arguments: Tensor | int | float | str) -> list[tuple]:
    """The operator's arguments -> (kernel, grid, arguments by name, options)s; nothing runs, as compiling ahead of time needs it."""
    *tensors, rule, coef, t, retention, gamma, sinks = arguments
    names = "k v length n_new rows k_direction v_direction k_magnitude v_magnitude exact k_retained v_retained retained_pos " \
            "retained_score score_range overflow k_window v_window rotation k_levels v_levels"
    named = dict(zip(names.split(), tensors, strict=True))
    chosen, window = named["rows"] is not None, named["k_window"]
    named |= {x: named[x].contiguous() for x in ("length", "n_new")}
    named["rows"] = named["rows"].contiguous() if chosen else named["length"]
    (n, B, G, tokens, D), heads, count = named["k"].shape, window.shape[1] * window.shape[2], named["k"][0, ..., 0].numel()
    N, R, W = (named[name].shape[3] for name in ("k_magnitude", "k_retained", "k_window"))
    for x in "kv":      # rows of a step's vectors may lie apart, as they were projected: `store` finds what leaves in the window
        new = named[x].to(window.dtype)
        named[x] = new = new if W and tokens == 1 and new[0, 0].is_contiguous() else new.contiguous()
        named |= {f"{x}_member": new.stride(0), f"{x}_row": new.stride(1)}
    named |= dict(N=N, R=R, sinks=sinks, gamma=gamma, G=G, W=W, D=D, MEMBERS=n, RULE=rule, PROJECTION=coef == "projection", T=t,
                  RETENTION=retention, SLOTS=triton.next_power_of_2(R) if R else 0, CHOSEN=chosen, heads=heads, count=count, tokens=tokens,
                  far=torch.empty(2 if R else 0, count, device=window.device))
    for x in "kv":
        direction = named[f"{x}_direction"]
        named[f"{x.upper()}_BITS"] = direction.shape[4] * 8 // D if direction.dtype == torch.uint8 else 16
        named[f"{x.upper()}_OWN"] = direction.shape[0] == n
    DP, wide = triton.next_power_of_2(D), 8 in (named["K_BITS"], named["V_BITS"])
    many = count > FEW and D == DP <= 128 and not wide              # elsewhere such blocks spill
    named |= dict(BLOCK=32 if many else 16, DEPTH=max(16, min(DP, (2048 if many else 8192 if wide else 16384) // DP)))
    grid = triton.cdiv(count, named["BLOCK"]), 2 * n if named["K_OWN"] or named["V_OWN"] else 2
    plan = [(store, grid, {"num_warps": 4 if many else 8, "num_stages": 1, "maxnreg": 168})] if N else []
    if R or W:                              # without fusion: see threshold
        plan.append((keep, (B * G,), {"num_warps": min(max(named["SLOTS"] // 1024, 1), 16), "enable_fp_fusion": False}))
    return [(kernel, grid, {name: named[name] for name in kernel.arg_names}, options) for kernel, grid, options in plan]
