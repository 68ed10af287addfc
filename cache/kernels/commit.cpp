// One new token per row into a group of one or two layers, on CPU. The operator: cache/kernels/__init__.py; what is stored: cache/split.py,
// cache/merge.py and cache/codec.py, whose arithmetic in fp32 is done in fp64 here, where no sum needs scaling first.
//
// A pair's geometry is three inner products of its vectors x0 and x1: a = x0.x0, b = x1.x1, c = x0.x1. From them follow the distance and,
// for every rule, the direction w0 x0 + w1 x1. Layers alike, opposed or at right angles give exact distances, so that ties stay ties.
// The kv heads of all rows are independent: a row's result depends neither on its neighbours nor on the number of threads.
#include "block.h"

namespace {

typedef double vd __attribute__((vector_size(32)));
typedef float vf4 __attribute__((vector_size(16)));

enum Rule { SLERP, MEAN, MAX_NORM, OPTIMAL };       // FAST_RULES in cache/split.py
enum Retention { TOPK, INTENDED, LITERAL };

struct Args : State {       // filled by cache/kernels/cpp.py in this order, eight bytes each
    const char *k, *v; const int64_t *length, *n_new;
    int64_t n, B, rule, projection, retention, sinks, threads;
    double t, gamma;
};

// K or V of all members.
struct Kind { const char* fresh; char *direction, *magnitude, *retained, *window; const float* levels; int64_t bits; bool own; };

double inner(const float* x, const float* y, int P) {
    auto wide = [](const float* p) { vf4 x; memcpy(&x, p, sizeof x); return __builtin_convertvector(x, vd); };
    vd s = {}, r = {};
    for (int i = 0; i < P; i += LANES) s += wide(x + i) * wide(y + i), r += wide(x + i + 4) * wide(y + i + 4);
    s += r;
    return (s[0] + s[2]) + (s[1] + s[3]);
}

double angle_between(double a, double b, double c) {    // two zero vectors: 0; one: a right angle, as cache/merge.py
    return a > 0 && b > 0 ? std::acos(std::clamp(c / std::sqrt(a * b), -1., 1.)) : a == b ? 0 : M_PI / 2;
}

uint16_t to_half(float x) {         // to the nearest, ties to even, as all of PyTorch's casts
    uint32_t u;
    memcpy(&u, &x, 4);
    const uint32_t sign = u >> 16 & 0x8000, size = u & 0x7fffffff;
    if (size >= 0x47800000) return sign | (size > 0x7f800000 ? 0x7e00 : 0x7c00);       // infinite, or not a number
    if (size < 0x38800000) {                                                            // subnormal: adding 0.5 leaves the bits in place
        float y = from_bits(size) + 0.5f;
        memcpy(&u, &y, 4);
        return sign | (u - 0x3f000000);
    }
    return sign | (size - 0x38000000 + 0xfff + (size >> 13 & 1)) >> 13;                 // may round up to infinity
}

void narrow(const float* x, Type type, int D, char* row) {
    auto out = (uint16_t*)row;
    if (type == F32) memcpy(row, x, 4 * D);
    else if (type == F16) for (int i = 0; i < D; i++) out[i] = to_half(x[i]);
    else for (int i = 0; i < D; i++) {
        uint32_t u;
        memcpy(&u, &x[i], 4);
        out[i] = x[i] == x[i] ? (u + 0x7fff + (u >> 16 & 1)) >> 16 : 0x7fc0;
    }
}

struct Writer {
    const Args& args;
    const Type type;
    const int D, P;             // P: D rounded up to LANES, pads are zero
    const int64_t heads, row;   // row: bytes of an exact vector
    const Kind kinds[2];
    std::vector<float> x, direction, rotated;
    std::vector<int32_t> code;

    explicit Writer(const Args& a)
        : args(a), type((Type)a.dtype), D(a.D), P((a.D + LANES - 1) / LANES * LANES), heads(a.B * a.G), row(D * (type == F32 ? 4 : 2)),
          kinds{{a.k, a.k_direction, a.k_magnitude, a.k_retained, a.k_window, a.k_levels, a.k_bits, (bool)a.k_own},
                {a.v, a.v_direction, a.v_magnitude, a.v_retained, a.v_window, a.v_levels, a.v_bits, (bool)a.v_own}},
          x(2 * P), direction(P), rotated(P), code(P) {}

    void run(int64_t head) {
        const int64_t b = head / args.G, length = args.length[b], pos = length - args.W;
        if (!args.n_new[b]) return;
        if (pos >= 0) {         // a token leaves the window
            const int64_t to = std::min(pos, args.N - 1);
            float far = 0;
            int pairs = 0;
            for (const Kind& kind : kinds) store(kind, head, to, far, pairs);
            if (args.R) retain(head, to, pairs ? far / pairs : 0, pairs);
        }
        for (const Kind& kind : kinds)
            for (int64_t l = 0; l < args.n && args.W; l++) memcpy(slot(kind, l, head), fresh(kind, l, head), row);
    }

    const char* fresh(const Kind& kind, int64_t l, int64_t head) const { return kind.fresh + (l * heads + head) * row; }
    char* slot(const Kind& kind, int64_t l, int64_t head) const {
        return kind.window + ((l * heads + head) * args.W + args.length[head / args.G] % args.W) * row;
    }
    const char* leaving(const Kind& kind, int64_t l, int64_t head) const { return args.W ? slot(kind, l, head) : fresh(kind, l, head); }

    void store(const Kind& kind, int64_t head, int64_t to, float& far, int& pairs) {
        for (int64_t l = 0; l < args.n; l++) widen(leaving(kind, l, head), type, D, P, &x[l * P]);
        const float *x0 = &x[0], *x1 = &x[P];
        if (kind.own || args.n == 1) {
            for (int64_t l = 0; l < args.n; l++) {
                const double norm = std::sqrt(inner(&x[l * P], &x[l * P], P));
                combine(&x[l * P], 1 / std::max(norm, 1e-20), &x[l * P], 0);
                magnitude(kind, l, head, to, norm / put(kind, l, head, to));
            }
            return;
        }
        const double a = inner(x0, x0, P), b = inner(x1, x1, P), c = inner(x0, x1, P), angle = angle_between(a, b, c);
        far += (float)angle / (float)M_PI, pairs++;
        float w[2];                 // fp32, so that products are exact in fp64 and opposed layers of one length cancel to zero
        weigh(a, b, c, angle, w);
        combine(x0, w[0], x1, w[1]);
        const double by = 1 / std::max(std::sqrt(inner(&direction[0], &direction[0], P)), 1e-20);
        for (float& d : direction) d *= by;
        const double along[2] = {inner(x0, &direction[0], P), inner(x1, &direction[0], P)}, norm[2] = {std::sqrt(a), std::sqrt(b)};
        const double length = put(kind, 0, head, to);
        for (int l = 0; l < 2; l++) magnitude(kind, l, head, to, (args.projection ? along[l] : norm[l]) / length);
    }

    // The weights of x0 and x1 by rule, unnormalised.
    void weigh(double a, double b, double c, double angle, float* w) const {
        const double norm0 = std::sqrt(a), norm1 = std::sqrt(b), t = args.t;
        if (args.rule == SLERP) {
            const double sine = std::sin(angle);
            const bool safe = sine > 1e-6;
            w[0] = (safe ? std::sin((1 - t) * angle) / sine : 1 - t) / std::max(norm0, 1e-20);
            w[1] = (safe ? std::sin(t * angle) / sine : t) / std::max(norm1, 1e-20);
        } else if (args.rule == MEAN) w[0] = w[1] = 0.5;
        else if (args.rule == MAX_NORM) w[0] = norm0 >= norm1, w[1] = 1 - w[0];
        else if (!args.projection) w[0] = norm0, w[1] = norm1;
        else {
            const double half = 0.5 * std::atan2(2 * c, a - b);
            w[0] = std::cos(half), w[1] = std::sin(half);
        }
    }

    void combine(const float* x, double by_x, const float* y, double by_y) {
        for (int i = 0; i < P; i++) direction[i] = by_x * x[i] + by_y * y[i];
    }

    // The direction into column `to`, as it is or as codes. Returns the length that it decodes to, 1 if as it is.
    double put(const Kind& kind, int64_t m, int64_t head, int64_t to) {
        const int64_t size = kind.bits == 16 ? row : D * kind.bits / 8;
        char* out = kind.direction + ((m * heads + head) * args.N + to) * size;
        if (kind.bits == 16) {
            narrow(&direction[0], type, D, out);
            return 1;
        }
        rotate(&direction[0], args.rotation, D, std::sqrt((float)D), &rotated[0]);
        std::fill(code.begin(), code.end(), 0);
        for (int step = 1 << (kind.bits - 1); step; step /= 2)      // code = how many cuts lie below
            for (int i = 0; i < D; i++) {
                const float* level = kind.levels + code[i] + step;
                code[i] += rotated[i] > (level[0] + level[-1]) / 2 ? step : 0;
            }
        for (int i = 0; i < D; i++) rotated[i] = kind.levels[code[i]];
        for (int shift = 0; shift < kind.bits;) {                   // planes: PLANES in cache/codec.py
            const int width = kind.bits == 3 ? 2 - shift / 2 : kind.bits, places = 8 / width, bytes = D / places;
            for (int i = 0; i < bytes; i++) {
                int byte = 0;
                for (int p = 0; p < places; p++) byte |= (code[p * bytes + i] >> shift & ((1 << width) - 1)) << p * width;
                *out++ = byte;
            }
            shift += width;
        }
        return std::sqrt(inner(&rotated[0], &rotated[0], P));
    }

    void magnitude(const Kind& kind, int64_t l, int64_t head, int64_t to, float x) const {
        const int64_t at = (l * heads + head) * args.N + to;
        if (!args.half_magnitude) ((float*)kind.magnitude)[at] = std::clamp(x, -3.4028235e38f, 3.4028235e38f);
        else ((uint16_t*)kind.magnitude)[at] = to_half(std::clamp(x, -65504.f, 65504.f));
    }

    // The R largest scores so far: the token takes the worst slot if it is better; of equally bad ones the newest goes.
    void retain(int64_t head, int64_t to, float distance, bool scored) const {
        float *kept = args.retained_score + head * args.R, *range = args.score_range + 2 * head, score = -INFINITY;
        int32_t* at = args.retained_pos + head * args.R;
        uint8_t* exact = args.exact + head * args.N;
        const bool sink = to < args.sinks;
        const float before = threshold(range, scored);
        if (scored) score = args.retention == LITERAL ? -distance : distance;
        if (scored && !sink) range[0] = std::min(range[0], score), range[1] = std::max(range[1], score);
        if (sink) score = 2;            // SINK in cache/split.py
        const float least = threshold(range, scored);
        int64_t worst = 0;
        for (int64_t r = 1; r < args.R; r++)
            if (kept[r] < kept[worst] || (kept[r] == kept[worst] && at[r] > at[worst])) worst = r;
        const float lost = std::min(score, kept[worst]);
        if (score > kept[worst]) {
            exact[at[worst]] = 0;
            kept[worst] = score, at[worst] = to, exact[to] = score > least;
            for (const Kind& kind : kinds)
                for (int64_t l = 0; l < args.n; l++)
                    memcpy(kind.retained + ((l * heads + head) * args.R + worst) * row, leaving(kind, l, head), row);
        }
        for (int64_t r = 0; r < args.R && least != before; r++) exact[at[r]] = kept[r] > least;
        if (scored && args.retention != TOPK) args.overflow[head] += lost > least;
    }

    float threshold(const float* range, bool scored) const {        // SplitGroup.threshold bit for bit: no product is fused into the sum
        if (!scored || args.retention == TOPK) return -INFINITY;
        const float span = range[1] - range[0], step = (double)(float)args.gamma * span;
        return range[1] >= range[0] ? std::min(range[1] - step, 1.f) : 1.f;
    }
};

}  // namespace

extern "C" void commit(const Args* args) {
    const Args& a = *args;
    const int64_t heads = a.B * a.G;
    // waking threads costs about as much as rotating 16 vectors of 128: fewer heads stay on this one
    const int threads = heads * a.D * a.D >= 1 << 19 ? std::min(a.threads, heads) : 1;
    if (threads == 1) {
        Writer writer(a);
        for (int64_t head = 0; head < heads; head++) writer.run(head);
        return;
    }
#pragma omp parallel num_threads(threads)
    {
        Writer writer(a);
#pragma omp for
        for (int64_t head = 0; head < heads; head++) writer.run(head);
    }
}
