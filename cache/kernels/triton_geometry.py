"""A pair of vectors merged, in Triton: cache/merge.py from a = x0.x0, b = x1.x1 and c = x0.x1 in fp64, as in commit.cpp."""
import triton
import triton.language as tl

TINY = tl.constexpr(1e-20)          # cache/merge.py
SLERP, MEAN, MAX_NORM = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)       # FAST_RULES in cache/split.py; 3: optimal


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
