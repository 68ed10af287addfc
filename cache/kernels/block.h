// What happens to one block of up to BLOCK columns: rows of storage -> scratch that stays in L1, scores of a query, weighted sum of values.
//
// Scratch has one of three forms, all of 32-bit words, so one pair of loops serves them:
//   floats  plain rows, codes of fp32 models, 8-bit K
//   bytes   K of up to 4 bits: a word is four levels on a grid of 7 bits; queries become 8 bits, sums of products are exact. Both roundings
//           together add less than 1 % to the squared error of the codes themselves.
//   pairs   V of bf16 and fp16 models: a word is the int16 levels of columns c and c + BLOCK / 2, probabilities are 13 bits and a sign
// Rows of scratch are P = D rounded up to 32 words. What stands in the pads of K meets zeros of the query, so it must only be finite.
#pragma once
#include <vector>
#include "vector.h"

namespace {

constexpr int BLOCK = 32;
constexpr float INT_MAX_V = 8191;       // largest level and probability as int16: BLOCK products of the two stay below 2^31

// -- formats ----------------------------------------------------------------------------------------------------------------------------
enum Type { F32, BF16, F16 };

INLINE float from_bits(uint32_t u) { float x; memcpy(&x, &u, 4); return x; }
INLINE float from_half(uint16_t h) {        // the exponent moves by a multiplication, which is right for subnormals too; vectorises
    return from_bits((h & 0x7fffu) << 13 | (h & 0x8000u) << 16) * 0x1p112f;
}

// The buffers of one layer group (SplitGroup), null where empty, and what follows from their shapes; filled by `state` in cpp.py.
struct State {
    char *k_direction, *v_direction, *k_magnitude, *v_magnitude; uint8_t* exact;
    char *k_retained, *v_retained; int32_t* retained_pos; float *retained_score, *score_range; int32_t* overflow;
    char *k_window, *v_window; const float *rotation, *k_levels, *v_levels;
    int64_t G, D, N, R, W, k_bits, v_bits, k_own, v_own, dtype, half_magnitude;
};

// What a stored row means: plain numbers of a type (bits 16), or codes and what a code becomes in scratch.
enum Form { FLOATS, BYTES, PAIRS };
constexpr int MIDDLE = 63, Q_MAX = 127;     // BYTES: level 0; the largest query. A product is at most 2 * 63 * 127

struct Format {
    int bits;
    Type type;
    Form form;
    float unit = 1;                         // of an integer level
    uint32_t word[256] = {};
    alignas(32) uint8_t byte[4][16] = {};   // the first 16 words byte by byte, for lookups by byte shuffle

    Format(Type type, int bits, const float* level, Form integers) : bits(bits), type(type), form(FLOATS) {
        if (bits == 16) return;
        const int n = 1 << bits;
        const float most = std::max(-level[0], level[n - 1]);       // levels ascend
        if (type != F32 && !(integers == BYTES && bits == 8)) form = integers;
        if (form == PAIRS) unit = most / INT_MAX_V;
        float least = INFINITY;
        for (int steps = MIDDLE; form == BYTES && steps > MIDDLE * 3 / 4; steps--) {        // the grid that lies nearest to the levels
            const float step = most / steps;
            float error = 0;
            for (int i = 0; i < n; i++) {
                const float off = level[i] - step * std::lrint(level[i] / step);
                error += off * off;
            }
            if (error < least) least = error, unit = step;
        }
        for (int i = 0; i < n; i++) {
            memcpy(&word[i], &level[i], 4);
            if (form == BYTES) word[i] = MIDDLE + std::lrint(level[i] / unit);
            if (form == PAIRS) word[i] = (uint16_t)std::lrint(level[i] / unit);
            for (int j = 0; j < 4 && i < 16; j++) byte[j][i] = word[i] >> 8 * j;
        }
    }
    int64_t bytes(int64_t D) const { return bits < 16 ? D * bits / 8 : D * (type == F32 ? 4 : 2); }     // of a row
};

INLINE void widen(const char* row, Type type, int D, int P, float* out) {
    auto in = (const uint16_t*)row;
    if (type == F32) memcpy(out, row, 4 * D);
    else if (type == BF16) for (int i = 0; i < D; i++) out[i] = from_bits((uint32_t)in[i] << 16);
    else for (int i = 0; i < D; i++) out[i] = from_half(in[i]);
    for (int i = D; i < P; i++) out[i] = 0;
}

// A row of codes -> one code a byte, in order. Packed by planes: coordinate c of a plane with p codes a byte is in byte c mod (D / p).
// W: as many bytes as are worked on at once, at most D / p; the last step overlaps the one before where they do not fill it.
template <int BITS, class W> INLINE void unpack(const char* row, int D, uint8_t* code) {
    constexpr int PLACES = BITS == 4 ? 2 : BITS == 2 ? 4 : 8;
    const int n = D / PLACES, step = sizeof(W);
    auto each = [](int x) { W w; memset(&w, x, sizeof w); return w; };
    auto read = [&](int i) { W w; memcpy(&w, row + i, sizeof w); return w; };
    for (int i = 0, last = 0; !last; i += step) {
        last = i + step >= n, i = std::min(i, n - step);
        const W w = read(i), next = BITS == 3 ? read(n + i) : w, top = BITS == 3 ? read(2 * n + i) : w;     // 3: planes of 2 bits and of 1
        for (int j = 0; j < PLACES; j++) {
            W x = w >> j * BITS & each((1 << BITS) - 1);
            if (BITS == 3) x = ((j % 2 ? next : w) >> j / 2 * 2 & each(3)) | (top >> j & each(1)) << 2;
            memcpy(code + j * n + i, &x, sizeof x);
        }
    }
}
template <int BITS> INLINE void unpack(const char* row, int D, uint8_t* code) {
    typedef uint8_t v16 __attribute__((vector_size(16)));
    const int n = D / (BITS == 4 ? 2 : BITS == 2 ? 4 : 8);
    n >= 16 ? unpack<BITS, v16>(row, D, code) : n >= 8 ? unpack<BITS, uint64_t>(row, D, code) : unpack<BITS, uint8_t>(row, D, code);
}

// n coordinates of a row of codes, one a byte or (NIBBLES) packed by planes, as scratch; PAIRS: a's level | b's.
template <Form FORM, bool NIBBLES> INLINE void look_up(const Format& format, const uint8_t* a, const uint8_t* b, int n, uint32_t* out) {
#ifdef __AVX2__
    if (format.bits < 8) {
        // A byte shuffle looks up one byte of 32 words; interleaving the bytes makes the words. It works within halves of 16 bytes, so what
        // is to end up in order is dealt to the halves first, packed codes before they are parted.
        const __m256i deal = _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7), mask = _mm256_set1_epi8(15);
        auto read = [&](const uint8_t* from) {
            const __m256i x = _mm256_loadu_si256((const __m256i*)from);
            return FORM == BYTES ? x : _mm256_permutevar8x32_epi32(x, deal);
        };
        constexpr int SIZE = FORM == BYTES ? 1 : FORM == PAIRS ? 2 : 4;         // bytes of a level
        __m256i table[SIZE], x[2], t[SIZE];
        for (int j = 0; j < SIZE; j++) table[j] = _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i*)format.byte[j]));
        for (int i = 0; i < (NIBBLES ? n / 2 : n); i += 32) {
            x[0] = read(a + i);
            if (FORM == PAIRS) {
                const __m256i y = x[0], z = read(b + i);
                x[0] = _mm256_unpacklo_epi8(y, z), x[1] = _mm256_unpackhi_epi8(y, z);
            }
            for (int part = 0; part <= NIBBLES; part++)
                for (int k = 0; k <= (FORM == PAIRS); k++) {
                    const int at = part * n / 2 + i + 16 * k;
                    const __m256i code = _mm256_and_si256(part ? _mm256_srli_epi16(x[k], 4) : x[k], mask);
                    for (int j = 0; j < SIZE; j++) t[j] = _mm256_shuffle_epi8(table[j], code);
                    if constexpr (FORM == BYTES) store((uint8_t*)out + at, t[0]);
                    else {
                        const __m256i low = _mm256_unpacklo_epi8(t[0], t[1]), high = _mm256_unpackhi_epi8(t[0], t[1]);
                        if constexpr (FORM == PAIRS) store(out + at, low), store(out + at + 8, high);
                        else {
                            const __m256i more = _mm256_unpacklo_epi8(t[2], t[3]), most = _mm256_unpackhi_epi8(t[2], t[3]);
                            store(out + at, _mm256_unpacklo_epi16(low, more)), store(out + at + 8, _mm256_unpackhi_epi16(low, more));
                            store(out + at + 16, _mm256_unpacklo_epi16(high, most));
                            store(out + at + 24, _mm256_unpackhi_epi16(high, most));
                        }
                    }
                }
        }
        return;
    }
#endif
    for (int i = 0; i < n; i++) {
        auto word = [&](const uint8_t* row) { return format.word[!NIBBLES ? row[i] : i < n / 2 ? row[i] & 15 : row[i - n / 2] >> 4]; };
        if (FORM == BYTES) ((uint8_t*)out)[i] = word(a);
        else out[i] = FORM == PAIRS ? word(a) | word(b) << 16 : word(a);
    }
}

// -- scratch ----------------------------------------------------------------------------------------------------------------------------
struct Scratch {
    const int D, P;
    std::vector<float> words;
    std::vector<uint8_t> code;              // one a byte
    Scratch(int D, int P) : D(D), P(P), words(BLOCK * P + 32), code(BLOCK * P + 64) {}

    // n rows -> floats or bytes [n, P], or pairs [min(n, BLOCK / 2), P].
    void fill(const char* const* row, int n, const Format& format) {
        if (D == 128) fill<128>(row, n, format);        // known widths: the loops become straight vector code
        else if (D == 64) fill<64>(row, n, format);
        else fill<0>(row, n, format);
    }

    template <int KNOWN> void fill(const char* const* row, int n, const Format& format) {
        const int D = KNOWN ? KNOWN : this->D, P = KNOWN ? KNOWN : this->P;
        const bool nibbles = format.bits == 4 && D % 64 == 0;       // packed rows are looked up as they are
        for (int c = 0; c < n && !nibbles; c++) {
            if (format.bits == 16) fetch(row[c], format.bytes(D)), widen(row[c], format.type, D, P, &words[c * P]);
            if (format.bits == 8) memcpy(&code[c * P], row[c], D);
            if (format.bits == 4 && !nibbles) unpack<4>(row[c], D, &code[c * P]);
            if (format.bits == 3) unpack<3>(row[c], D, &code[c * P]);
            if (format.bits == 2) unpack<2>(row[c], D, &code[c * P]);
        }
        if (format.bits < 16) nibbles ? decode<true>(row, n, P, format) : decode<false>(row, n, P, format);
    }

    static INLINE void fetch(const char* row, int64_t bytes) {         // the same column of the next block; L1 waits for few lines at a time, L2 for many
        for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(row + BLOCK * bytes + b, 0, 2);
    }

    template <bool NIBBLES> INLINE void decode(const char* const* row, int n, int P, const Format& format) {
        const int64_t bytes = format.bytes(D);
        auto at = [&](int c) {
            fetch(row[c], bytes);
            return NIBBLES ? (const uint8_t*)row[c] : &code[c * P];
        };
        auto out = (uint32_t*)words.data();
        if (format.form == FLOATS) for (int c = 0; c < n; c++) look_up<FLOATS, NIBBLES>(format, at(c), nullptr, P, out + c * P);
        else if (format.form == BYTES) for (int c = 0; c < n; c++) look_up<BYTES, NIBBLES>(format, at(c), nullptr, P, out + c * P / 4);
        else for (int c = 0; c < std::min(n, BLOCK / 2); c++) look_up<PAIRS, NIBBLES>(format, at(c), at(c + BLOCK / 2), P, out + c * P);
    }
};

// -- arithmetic, HEADS query heads together; T is float, or int32_t: bytes in score, pairs in add ----------------------------------------
// s[h][c] = q[h] . k[c]; the loop holds about eight sums in registers, so several columns are taken at once where heads are few.
template <class T, int HEADS> void score(const T* q, const T* k, int n, int width, float* s) {
    constexpr int COLUMNS = HEADS == 1 ? 8 : HEADS == 2 ? 4 : HEADS <= 4 ? 2 : 1;
    using V = decltype(load(q));
    for (int c = 0; c < n; c += COLUMNS) {      // may run past n into old rows of scratch: those scores are dropped later
        V acc[HEADS][COLUMNS] = {}, x[COLUMNS];
#pragma GCC unroll 4
        for (int i = 0; i < width; i += LANES) {
            for (int j = 0; j < COLUMNS; j++) x[j] = load(k + (c + j) * width + i);
            for (int h = 0; h < HEADS; h++)
                for (int j = 0; j < COLUMNS; j++) acc[h][j] = multiply_add_4(acc[h][j], load(q + h * width + i), x[j]);
        }
        float each[HEADS * COLUMNS + 3];
        sums<HEADS * COLUMNS>(&acc[0][0], each);
        for (int h = 0; h < HEADS; h++) for (int j = 0; j < COLUMNS; j++) s[h * BLOCK + c + j] = each[h * COLUMNS + j];
    }
}

// y[h] += by[h] * (sum over c of p[h][c] v[c]), a strip of the head dimension at a time.
template <class T, int HEADS> void add(const T* p, const T* v, int n, int width, const float* by, float* y) {
    constexpr int STRIP = HEADS <= 2 ? 4 : HEADS <= 4 ? 2 : 1;
    using V = decltype(load(v));
    for (int i = 0; i < width; i += STRIP * LANES) {
        V acc[HEADS][STRIP] = {}, x[STRIP];
        for (int c = 0; c < n; c++) {
            for (int j = 0; j < STRIP; j++) x[j] = load(v + c * width + i + j * LANES);
            for (int h = 0; h < HEADS; h++)
                for (int j = 0; j < STRIP; j++) acc[h][j] = multiply_add(acc[h][j], all(p[h * BLOCK + c]), x[j]);
        }
        for (int h = 0; h < HEADS; h++)
            for (int j = 0; j < STRIP; j++) {
                float* to = y + h * width + i + j * LANES;
                store(to, load(to) + by[h] * to_float(acc[h][j]));
            }
    }
}

template <class T> struct Loops {       // by number of heads - 1; more than 8 go in turns
    static constexpr decltype(&score<T, 1>) scores[] = {score<T, 1>, score<T, 2>, score<T, 3>, score<T, 4>,
                                                        score<T, 5>, score<T, 6>, score<T, 7>, score<T, 8>};
    static constexpr decltype(&add<T, 1>) adds[] = {add<T, 1>, add<T, 2>, add<T, 3>, add<T, 4>, add<T, 5>, add<T, 6>, add<T, 7>, add<T, 8>};
};

// out = x @ rotation * by, a strip at a time so that its sums stay in registers. D is a multiple of LANES, as codes have it.
inline void rotate(const float* x, const float* rotation, int D, float by, float* out) {
    constexpr int STRIP = 8;
    for (int j = 0; j < D; j += STRIP * LANES) {
        vf acc[STRIP] = {};
        const int some = std::min(STRIP, (D - j) / LANES);
        for (int i = 0; i < D; i++) {
            const float* from = rotation + (int64_t)i * D + j;
            const vf d = all(x[i]);
            if (some == STRIP) for (int s = 0; s < STRIP; s++) acc[s] += d * load(from + s * LANES);
            else for (int s = 0; s < some; s++) acc[s] += d * load(from + s * LANES);
        }
        for (int s = 0; s < some; s++) store(out + j + s * LANES, acc[s] * by);
    }
}

}  // namespace
