// New tokens of each row, one after the other, into a group of one or two layers, on CPU. The operator: cache/kernels/__init__.py; what is
// stored: cache/split.py, cache/merge.py and cache/codec.py, whose arithmetic in fp32 is done in fp64 here, where no sum needs scaling first.
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
    const char *k, *v; const int64_t *length, *n_new, *rows;        // rows: the slots of the B rows of a call, null: all, in order
    int64_t n, B, T, slots, rule, projection, retention, sinks, threads;
    double t, gamma;
};

std::vector<float> between(const float* levels, int64_t bits) {
    std::vector<float> cuts(bits < 16 ? (1 << bits) - 1 : 0);
    for (size_t i = 0; i < cuts.size(); i++) cuts[i] = (levels[i] + levels[i + 1]) / 2;
    return cuts;
}

// K or V of all members.
struct Kind {
    const char* fresh; char *direction, *magnitude, *retained, *window; const float* levels; int64_t bits; bool own;
    std::vector<float> cuts = between(levels, bits);
};

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
    int64_t caller = 0, head = 0, lane = 0, length = 0; // of the token at hand: kv head in the call and in the cache, lane, tokens before it
    int64_t worst = -1;                                 // the retained slot that goes next; -1: not known

    explicit Writer(const Args& a)
        : args(a), type((Type)a.dtype), D(a.D), P((a.D + LANES - 1) / LANES * LANES), heads(a.slots * a.G), row(D * (type == F32 ? 4 : 2)),
          kinds{{a.k, a.k_direction, a.k_magnitude, a.k_retained, a.k_window, a.k_levels, a.k_bits, (bool)a.k_own},
                {a.v, a.v_direction, a.v_magnitude, a.v_retained, a.v_window, a.v_levels, a.v_bits, (bool)a.v_own}},
          x(2 * P), direction(P), rotated(P), code(P) {}

    void run(int64_t head_of_call) {
        const int64_t b = head_of_call / args.G, some = std::min(args.n_new[b], args.T);
        caller = head_of_call, head = (args.rows ? args.rows[b] : b) * args.G + caller % args.G, worst = -1;
        for (lane = 0, length = args.length[b]; lane < some; lane++, length++) {
            if (length >= args.W) {         // a token leaves the window
                const int64_t to = std::min(length - args.W, args.N - 1);
                float far = 0;
                int pairs = 0;
                for (const Kind& kind : kinds) store(kind, to, far, pairs);
                if (args.R) retain(to, pairs ? far / pairs : 0, pairs);
            }
            for (const Kind& kind : kinds)
                for (int64_t l = 0; l < args.n && args.W; l++) memcpy(slot(kind, l), fresh(kind, l), row);
        }
    }

    const char* fresh(const Kind& kind, int64_t l) const { return kind.fresh + ((l * args.B * args.G + caller) * args.T + lane) * row; }
    char* slot(const Kind& kind, int64_t l) const { return kind.window + ((l * heads + head) * args.W + length % args.W) * row; }
    const char* leaving(const Kind& kind, int64_t l) const { return args.W ? slot(kind, l) : fresh(kind, l); }

    void store(const Kind& kind, int64_t to, float& far, int& pairs) {
        for (int64_t l = 0; l < args.n; l++) widen(leaving(kind, l), type, D, P, &x[l * P]);
        const float *x0 = &x[0], *x1 = &x[P];
        if (kind.own || args.n == 1) {
            for (int64_t l = 0; l < args.n; l++) {
                const double norm = std::sqrt(inner(&x[l * P], &x[l * P], P));
                combine(&x[l * P], 1 / std::max(norm, 1e-20), &x[l * P], 0);
                magnitude(kind, l, to, norm / put(kind, l, to));
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
        const double decoded = put(kind, 0, to);
        for (int l = 0; l < 2; l++) magnitude(kind, l, to, (args.projection ? along[l] : norm[l]) / decoded);
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
    double put(const Kind& kind, int64_t m, int64_t to) {
        const int64_t size = kind.bits == 16 ? row : D * kind.bits / 8;
        char* out = kind.direction + ((m * heads + head) * args.N + to) * size;
        if (kind.bits == 16) {
            narrow(&direction[0], type, D, out);
            return 1;
        }
        rotate(&direction[0], args.rotation, D, std::sqrt((float)D), &rotated[0]);
        if (kind.bits > 4) {                // code = how many cuts lie below
            std::fill(code.begin(), code.end(), 0);
            for (int step = 1 << (kind.bits - 1); step; step /= 2)
                for (int i = 0; i < D; i++) code[i] += rotated[i] > kind.cuts[code[i] + step - 1] ? step : 0;
        } else for (int i = 0; i < D; i += LANES) {
            const vf r = load(&rotated[i]);
            vi below = {};
            for (float c : kind.cuts) below += r > all(c);       // true is -1
            ::store(&code[i], -below);
        }
        for (int i = 0; i < D; i++) rotated[i] = kind.levels[code[i]];
        for (int shift = 0; shift < kind.bits;) {                   // planes: PLANES in cache/codec.py
            const int width = kind.bits == 3 ? 2 - shift / 2 : kind.bits, bytes = D * width / 8, mask = (1 << width) - 1;
            std::fill(out, out + bytes, 0);
            for (int p = 0; p * bytes < D; p++)
                for (int i = 0; i < bytes; i++) out[i] |= (code[p * bytes + i] >> shift & mask) << p * width;
            out += bytes, shift += width;
        }
        return std::sqrt(inner(&rotated[0], &rotated[0], P));
    }

    void magnitude(const Kind& kind, int64_t l, int64_t to, float x) const {
        const int64_t at = (l * heads + head) * args.N + to;
        if (!args.half_magnitude) ((float*)kind.magnitude)[at] = std::clamp(x, -3.4028235e38f, 3.4028235e38f);
        else ((uint16_t*)kind.magnitude)[at] = to_half(std::clamp(x, -65504.f, 65504.f));
    }

    // The R largest scores so far: the token takes the worst slot if it is better; of equally bad ones the newest goes.
    void retain(int64_t to, float distance, bool scored) {
        float *kept = args.retained_score + head * args.R, *range = args.score_range + 2 * head, score = -INFINITY;
        int32_t* at = args.retained_pos + head * args.R;
        uint8_t* exact = args.exact + head * args.N;
        const bool sink = to < args.sinks;
        const float before = threshold(range, scored);
        if (scored) score = args.retention == LITERAL ? -distance : distance;
        if (scored && !sink) range[0] = std::min(range[0], score), range[1] = std::max(range[1], score);
        if (sink) score = 2;            // SINK in cache/split.py
        const float least = threshold(range, scored);
        if (worst < 0) for (int64_t r = worst = 0; r < args.R; r++)
            if (kept[r] < kept[worst] || (kept[r] == kept[worst] && at[r] > at[worst])) worst = r;
        const float lost = std::min(score, kept[worst]);
        if (score > kept[worst]) {
            exact[at[worst]] = 0;
            kept[worst] = score, at[worst] = to, exact[to] = score > least;
            for (const Kind& kind : kinds)
                for (int64_t l = 0; l < args.n; l++)
                    memcpy(kind.retained + ((l * heads + head) * args.R + worst) * row, leaving(kind, l), row);
            worst = worst + 1 < args.R && kept[worst + 1] == -INFINITY ? worst + 1 : -1;        // empty slots are alike
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
    // waking threads costs about as much as rotating 16 vectors of 128: less work stays on this one
    const int threads = heads * a.T * a.D * a.D >= 1 << 19 ? std::min(a.threads, heads) : 1;
    if (threads == 1) {
        Writer writer(a);
        for (int64_t head = 0; head < heads; head++) writer.run(head);
        return;
    }
#pragma omp parallel num_threads(threads)
    {
        Writer writer(a);
#pragma omp for schedule(dynamic)      // rows are of different lengths
        for (int64_t head = 0; head < heads; head++) writer.run(head);
    }
}
