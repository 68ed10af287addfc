"""`minicache::commit` on CUDA: one launch, one program for every (row, kv head). Written: what cache/split.py, merge.py and codec.py say.

`commit_triton` has the operator's arguments and writes the buffers in place; no host sync. As in commit.cpp, a pair's geometry is three
inner products of its vectors in fp64: a = x0.x0, b = x1.x1, c = x0.x1. A direction is never held whole: every use makes its coordinates
again from the leaving token's vectors, so that a rotation needs registers for a strip of rows only.
Trap: all threads of a program load its scalars and one writes them: what is written in place is read before a barrier, or by its writer.
"""
import torch
import triton
import triton.language as tl
from torch import Tensor

TINY = tl.constexpr(1e-20)          # cache/merge.py
SINK = tl.constexpr(2.0)            # cache/split.py
SLERP, MEAN, MAX_NORM = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)       # FAST_RULES in cache/split.py; 3: optimal
STRIP = tl.constexpr(4096)          # elements of the rotation loaded at once: 32 a thread
SLOTS_AT_ONCE = 1024                # retained slots looked at together


@triton.jit
def sine(x):
    """x fp64 in 0 .. pi, by Taylor's series: libdevice's reduces any argument, through memory."""
    x = tl.minimum(x, 3.141592653589793 - x)
    y = x * 0 + 1
    for i in tl.static_range(11, 0, -1):
        y = 1 - x * x * y * (1 / (2 * i * (2 * i + 1)))
    return x * y


@triton.jit
def angle_between(a, b, c):
    """0 .. pi, fp64. Exact for layers alike, opposed and at right angles; two zero vectors: 0; one: a right angle."""
    x = tl.where((a > 0) & (b > 0), c / tl.sqrt(tl.maximum(a * b, 1e-300)), tl.where(a == b, 1.0, 0.0))
    x = tl.minimum(tl.maximum(x, -1.0), 1.0)
    s, c = tl.sqrt(1 - x), tl.sqrt(1 + x)               # sine and cosine of the half, times sqrt(2)
    z = tl.minimum(s, c) / tl.maximum(s, c)
    for _ in tl.static_range(2):                        # the tangent of a quarter of its angle: at most 0.199
        z = z / (1 + tl.sqrt(1 + z * z))
    y = z * 0
    for i in tl.static_range(12, -1, -1):
        y = 1.0 / (2 * i + 1) - z * z * y
    angle = 8 * z * y
    return tl.where(s > c, 3.141592653589793 - angle, angle)


@triton.jit
def weigh(a, b, c, angle, RULE: tl.constexpr, PROJECTION: tl.constexpr, T: tl.constexpr):
    """The weights of x0 and x1 by rule, unnormalised; in fp32, so that products are exact in fp64 and opposed layers cancel to zero."""
    norm0, norm1 = tl.sqrt(a), tl.sqrt(b)
    if RULE == SLERP:
        sin = sine(angle)
        safe, by = sin > 1e-6, 1 / tl.maximum(sin, 1e-6)
        w0 = tl.where(safe, sine((1 - T) * angle) * by, 1 - T) / tl.maximum(norm0, TINY)
        w1 = tl.where(safe, sine(T * angle) * by, T) / tl.maximum(norm1, TINY)
    elif RULE == MEAN:
        w0, w1 = a * 0 + 1, a * 0 + 1
    elif RULE == MAX_NORM:
        w0 = tl.where(norm0 >= norm1, 1.0, 0.0)
        w1 = 1 - w0
    elif not PROJECTION:
        w0, w1 = norm0, norm1
    else:                               # cosine and sine of half the angle of (a - b, 2 c)
        r = tl.sqrt((a - b) * (a - b) + 4 * c * c)
        large = tl.sqrt(0.5 + 0.5 * tl.abs(a - b) / tl.maximum(r, 1e-300))      # the larger of the two is at least sqrt(1 / 2)
        large = tl.where(r > 0, large, 1.0)
        small = tl.abs(c) / tl.maximum(r * large, 1e-300)
        w0 = tl.where(a >= b, large, small)
        w1 = tl.where(a >= b, small, large) * tl.where(c < 0, -1.0, 1.0)
    return w0.to(tl.float32).to(tl.float64), w1.to(tl.float32).to(tl.float64)


@triton.jit
def mix(x, y, w0, w1, i, D: tl.constexpr):
    """Coordinates i of w0 x + w1 y, in fp64."""
    x = tl.load(x + i, mask=i < D, other=0).to(tl.float64)
    return w0 * x + w1 * tl.load(y + i, mask=i < D, other=0).to(tl.float64)


@triton.jit
def pack(target, code, each, WIDTH: tl.constexpr):
    """One plane of cache/codec.py: code [SLOTS, P] of WIDTH bits, coordinate s each + i at [s, i]. A wide plane takes several stores."""
    PARTS: tl.constexpr = code.shape[0] * WIDTH // 8
    slot, i = tl.arange(0, code.shape[0])[:, None], tl.arange(0, code.shape[1])
    for part in tl.static_range(PARTS):
        byte = tl.sum(tl.where(slot % PARTS == part, code << slot // PARTS * WIDTH, 0), 0)
        tl.store(target + part * each + i, byte.to(tl.uint8), mask=i < each)


@triton.jit
def put(x, y, w0, w1, target, levels, rotation, BITS: tl.constexpr, D: tl.constexpr):
    """The unit direction w0 x + w1 y into `target`, as it is or as codes. Returns the length that it decodes to, 1 if as it is."""
    DP: tl.constexpr = triton.next_power_of_2(D)
    if BITS == 16:
        d = tl.arange(0, DP)
        tl.store(target + d, mix(x, y, w0, w1, d, D).to(tl.float32).to(target.dtype.element_ty), mask=d < D)
        return w0 * 0 + 1
    else:
        # 1. rotate
        SLOTS: tl.constexpr = 8 if BITS == 3 else 8 // BITS             # a byte of the narrowest plane
        EACH: tl.constexpr = D // SLOTS
        P: tl.constexpr = triton.next_power_of_2(EACH)
        ROWS: tl.constexpr = STRIP // DP
        at = tl.arange(0, SLOTS)[:, None] * EACH + tl.arange(0, P)[None, :]
        here = tl.arange(0, P)[None, :] + at * 0 < EACH
        sums = tl.zeros([ROWS, SLOTS, P], tl.float32)
        for start in range(0, D, ROWS):
            row = start + tl.arange(0, ROWS)
            d = mix(x, y, w0, w1, row, D).to(tl.float32)
            strip = rotation + row[:, None, None] * D + at[None, :, :]
            sums += d[:, None, None] * tl.load(strip, mask=(row < D)[:, None, None] & here[None, :, :], other=0)
        rotated = tl.sum(sums, 0) * tl.sqrt(w0 * 0 + D).to(tl.float32)
        # 2. encode: how many cuts lie below
        code = at * 0
        for bit in tl.static_range(BITS - 1, -1, -1):
            level = levels + code + (1 << bit)
            code += tl.where(rotated > (tl.load(level) + tl.load(level - 1)) * 0.5, 1 << bit, 0)
        # 3. pack
        if BITS == 3:
            pack(target, code & 3, EACH, 2)
            pack(target + D // 4, code >> 2, EACH, 1)
        else:
            pack(target, code, EACH, BITS)
        level = tl.load(levels + code, mask=here, other=0).to(tl.float64)
        return tl.sqrt(tl.sum(tl.sum(level * level, 1), 0))


@triton.jit
def put_magnitude(target, x):
    most: tl.constexpr = 65504.0 if target.dtype.element_ty == tl.float16 else 3.4028234663852886e38
    tl.store(target, tl.minimum(tl.maximum(x.to(tl.float32), -most), most).to(target.dtype.element_ty))


@triton.jit
def store(x, member, direction, magnitude, levels, rotation, head, heads, to, N, BITS: tl.constexpr, OWN: tl.constexpr,
          MEMBERS: tl.constexpr, D: tl.constexpr, RULE: tl.constexpr, PROJECTION: tl.constexpr, T: tl.constexpr):
    """K or V of a token, vector l at x + l member, into column `to`. Returns the pair's distance in fp32, 0 where each is stored alone."""
    ROW: tl.constexpr = D if BITS == 16 else D * BITS // 8
    d = tl.arange(0, triton.next_power_of_2(D))
    column = head * N + to
    if OWN:
        for m in tl.static_range(MEMBERS):
            own, at = x + m * member, column + m * heads * N
            own_x = mix(own, own, 1, 0, d, D)
            norm = tl.sqrt(tl.sum(own_x * own_x, 0))
            length = put(own, own, 1 / tl.maximum(norm, TINY), norm * 0, direction + at * ROW, levels, rotation, BITS, D)
            put_magnitude(magnitude + at, norm / length)
        return 0.0
    else:
        y = x + member
        x0, x1 = mix(x, y, 1, 0, d, D), mix(x, y, 0, 1, d, D)
        a, b, c = tl.sum(x0 * x0, 0), tl.sum(x1 * x1, 0), tl.sum(x0 * x1, 0)
        angle = angle_between(a, b, c)
        w0, w1 = weigh(a, b, c, angle, RULE, PROJECTION, T)
        z = w0 * x0 + w1 * x1
        by = 1 / tl.maximum(tl.sqrt(tl.sum(z * z, 0)), TINY)
        z *= by
        along0, along1 = (tl.sum(x0 * z, 0), tl.sum(x1 * z, 0)) if PROJECTION else (tl.sqrt(a), tl.sqrt(b))
        length = put(x, y, w0 * by, w1 * by, direction + column * ROW, levels, rotation, BITS, D)
        put_magnitude(magnitude + column, along0 / length)
        put_magnitude(magnitude + column + heads * N, along1 / length)
        return (angle.to(tl.float32).to(tl.float64) / 3.1415927410125732).to(tl.float32)       # by pi in fp32, as the reference


@triton.jit
def threshold(least, most, gamma):
    """SplitGroup.threshold bit for bit: the launch forbids that the product is fused into the sum."""
    return tl.where(most >= least, tl.minimum(most - gamma * (most - least), 1.0), 1.0)


@triton.jit
def copy(target, to_member, source, member, MEMBERS: tl.constexpr, D: tl.constexpr):
    d = tl.arange(0, triton.next_power_of_2(D))
    for m in tl.static_range(MEMBERS):
        tl.store(target + m * to_member + d, tl.load(source + m * member + d, mask=d < D, other=0), mask=d < D)


@triton.jit
def retain(k, v, member, k_retained, v_retained, scores, positions, exact, score_range, overflow, heads, to, far, R, sinks, gamma,
           SCORED: tl.constexpr, RETENTION: tl.constexpr, SLOTS: tl.constexpr, MEMBERS: tl.constexpr, D: tl.constexpr):
    """The R largest scores so far: the token takes the worst slot if it is better; of equally bad ones the newest goes. One head's."""
    lane = tl.arange(0, SLOTS)
    # 1. the worst slot, lane by lane, then of all lanes
    least_of, newest, slot = tl.full([SLOTS], float("inf"), tl.float32), tl.full([SLOTS], -1, tl.int32), lane
    for start in range(0, R, SLOTS):
        score_at = tl.load(scores + start + lane, mask=start + lane < R, other=float("inf"))
        pos_at = tl.load(positions + start + lane, mask=start + lane < R, other=-1)
        worse = (score_at < least_of) | ((score_at == least_of) & (pos_at > newest))
        least_of, newest, slot = tl.where(worse, score_at, least_of), tl.where(worse, pos_at, newest), tl.where(worse, start + lane, slot)
    worst_score = tl.min(least_of, 0)
    old = tl.max(tl.where(least_of == worst_score, newest, -1), 0)
    worst = tl.min(tl.where((least_of == worst_score) & (newest == old), slot, R), 0)
    # 2. the token's score, and the threshold before and after it
    sink, score, before, least = to < sinks, float("-inf"), float("-inf"), float("-inf")
    if SCORED:
        score = -far if RETENTION == "literal" else far
        low, high = tl.load(score_range), tl.load(score_range + 1)
        new_low, new_high = tl.where(sink, low, tl.minimum(low, score)), tl.where(sink, high, tl.maximum(high, score))
        if RETENTION != "topk":
            before, least = threshold(low, high, gamma), threshold(new_low, new_high, gamma)
    score = tl.where(sink, SINK, score)
    wins = score > worst_score
    # 3. writing: no thread is still reading
    tl.debug_barrier()
    if SCORED:
        tl.store(score_range, new_low)
        tl.store(score_range + 1, new_high)
        if RETENTION != "topk":
            tl.store(overflow, tl.load(overflow) + tl.where(tl.minimum(score, worst_score) > least, 1, 0))
            if least != before:         # the winner's slot may be old or new here: its flag is written below
                for start in range(0, R, SLOTS):
                    here = (start + lane < R) & ((start + lane != worst) | (wins == 0))
                    flag = tl.load(scores + start + lane, mask=here, other=0) > least
                    tl.store(exact + tl.load(positions + start + lane, mask=here, other=0), flag, mask=here)
    if wins:
        tl.store(exact + old, False)
        tl.store(exact + to, score > least)
        tl.store(scores + worst, score)
        tl.store(positions + worst, to)
        copy(k_retained + worst * D, heads * R * D, k, member, MEMBERS, D)
        copy(v_retained + worst * D, heads * R * D, v, member, MEMBERS, D)


@triton.jit
def commit(k, v, length, n_new, k_direction, v_direction, k_magnitude, v_magnitude, exact, k_retained, v_retained, retained_pos,
           retained_score, score_range, overflow, k_window, v_window, rotation, k_levels, v_levels, N, R, sinks, gamma, G: tl.constexpr,
           W: tl.constexpr, D: tl.constexpr, MEMBERS: tl.constexpr, K_BITS: tl.constexpr, V_BITS: tl.constexpr, K_OWN: tl.constexpr,
           V_OWN: tl.constexpr, RULE: tl.constexpr, PROJECTION: tl.constexpr, T: tl.constexpr, RETENTION: tl.constexpr,
           RETAINED: tl.constexpr):
    """Program (row and kv head). Tensors as in `minicache::commit`, contiguous."""
    head, heads = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    if tl.load(n_new + head // G) == 0:
        return
    n = tl.load(length + head // G).to(tl.int32)
    k += head * D
    v += head * D
    old_k, old_v, member = k, v, heads * D
    if W > 0:
        old_k, old_v, member = k_window + (head * W + n % W) * D, v_window + (head * W + n % W) * D, heads * W * D
    if n >= W:                              # a token leaves the window
        to = tl.minimum(n - W, N - 1)
        far_k = store(old_k, member, k_direction, k_magnitude, k_levels, rotation, head, heads, to, N, K_BITS, K_OWN, MEMBERS, D, RULE,
                      PROJECTION, T)
        far_v = store(old_v, member, v_direction, v_magnitude, v_levels, rotation, head, heads, to, N, V_BITS, V_OWN, MEMBERS, D, RULE,
                      PROJECTION, T)
        if RETAINED > 0:
            far = (far_k + far_v) * (1.0 if K_OWN or V_OWN else 0.5)
            retain(old_k, old_v, member, k_retained + head * R * D, v_retained + head * R * D, retained_score + head * R,
                   retained_pos + head * R, exact + head * N, score_range + head * 2, overflow + head, heads, to, far, R, sinks, gamma,
                   not (K_OWN and V_OWN), RETENTION, RETAINED, MEMBERS, D)
    if W > 0:
        tl.debug_barrier()                  # the token that leaves was read from the slot that is written now
        copy(old_k, member, k, heads * D, MEMBERS, D)
        copy(old_v, member, v, heads * D, MEMBERS, D)


def commit_triton(*arguments: Tensor | int | float | str) -> None:
    """The operator (see cache/kernels/__init__.py). Buffers are contiguous."""
    kernel, grid, named, options = launch(*arguments)
    with torch.cuda.device_of(named["k"]):
        kernel[grid](**named, **options)


def launch(*arguments: Tensor | int | float | str) -> tuple:
    """The operator's arguments -> (kernel, grid, arguments by name, options); nothing runs, as compiling ahead of time needs it."""
    *tensors, rule, coef, t, retention, gamma, sinks = arguments
    rows = tensors.pop(4)
    assert rows is None and tensors[0].shape[3] == 1, "a step's tokens, see SplitGroup"
    named = dict(zip(commit.arg_names, tensors, strict=False))          # the kernel's tensors are the operator's but rows, in its order
    named |= {name: named[name].contiguous() for name in ("k", "v", "length", "n_new")}
    (n, B, G, _, D), N, R, W = named["k"].shape, *(named[name].shape[3] for name in ("k_magnitude", "k_retained", "k_window"))
    named |= dict(N=N, R=R, sinks=sinks, gamma=gamma, G=G, W=W, D=D, MEMBERS=n, RULE=rule, PROJECTION=coef == "projection", T=t,
                  RETENTION=retention, RETAINED=min(triton.next_power_of_2(R), SLOTS_AT_ONCE) if R else 0)
    for x in "kv":
        direction = named[f"{x}_direction"]
        named[f"{x.upper()}_BITS"] = direction.shape[4] * 8 // D if direction.dtype == torch.uint8 else 16
        named[f"{x.upper()}_OWN"] = direction.shape[0] == n
    return commit, (B * G,), named, {"num_warps": 4, "enable_fp_fusion": False}
