// Vectors of eight 32-bit words: the compiler's own (GCC and clang); AVX2 is written out only where they fall short: products of bytes and
// pairs (one instruction each where there is VNNI), horizontal sums. An integer word may stand for two int16 (pairs) or four bytes.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#ifdef __AVX2__
#include <immintrin.h>
#endif
#define INLINE inline __attribute__((always_inline))

namespace {     // or the loops of two builds in one process would be one

constexpr int LANES = 8;
typedef float vf __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));

INLINE vf load(const float* p) { vf x; memcpy(&x, p, sizeof x); return x; }
INLINE vi load(const int32_t* p) { vi x; memcpy(&x, p, sizeof x); return x; }
template <class V> INLINE void store(void* p, V x) { memcpy(p, &x, sizeof x); }
INLINE vf all(float x) { return vf{x, x, x, x, x, x, x, x}; }
INLINE vi all(int32_t x) { return vi{x, x, x, x, x, x, x, x}; }
INLINE vf larger(vf a, vf b) { return a > b ? a : b; }
INLINE vf to_float(vf x) { return x; }
INLINE vf to_float(vi x) { return __builtin_convertvector(x, vf); }
INLINE vf multiply_add(vf acc, vf a, vf b) { return acc + a * b; }
INLINE vi multiply_add(vi acc, vi a, vi b) {        // pairs: acc + a.low * b.low + a.high * b.high
#if defined __AVX512VNNI__
    return (vi)_mm256_dpwssd_epi32((__m256i)acc, (__m256i)a, (__m256i)b);
#elif defined __AVX2__
    return acc + (vi)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#else
    return acc + (a << 16 >> 16) * (b << 16 >> 16) + (a >> 16) * (b >> 16);
#endif
}
INLINE vf multiply_add_4(vf acc, vf q, vf k) { return acc + q * k; }
INLINE vi multiply_add_4(vi acc, vi q, vi k) {      // bytes: the four products of signed q and unsigned k; two of them stay below 2^15
#if defined __AVX512VNNI__
    return (vi)_mm256_dpbusd_epi32((__m256i)acc, (__m256i)k, (__m256i)q);
#elif defined __AVX2__
    return acc + (vi)_mm256_madd_epi16(_mm256_maddubs_epi16((__m256i)k, (__m256i)q), _mm256_set1_epi16(1));
#else
    for (int b = 0; b < 32; b += 8) acc += (q << (24 - b) >> 24) * (k >> b & 255);
    return acc;
#endif
}
INLINE vi pair(vi low, vi high) { return (low & 0xffff) | high << 16; }
INLINE vi nearest(vf x) {               // |x| < 2^22: adding 1.5 * 2^23 leaves the nearest integer in the low bits
    const vf big = all(12582912.f);
    return (vi)(x + big) - (vi)big;
}
INLINE vf exponential(vf x) {           // x <= 0; exactly 0 below -87. Degree 6 within +-ln(2) / 2: relative error 2e-7
    const vf in = larger(x, all(-88.f));
    const vi n = nearest(in * 1.44269504f);
    const vf by = to_float(n), r = in - by * 0.693359375f + by * 2.12194440e-4f;
    const vf p = 1 + r * (1 + r * (0.5f + r * (1 / 6.f + r * (1 / 24.f + r * (1 / 120.f + r * (1 / 720.f))))));
    return (vf)((vi)(p * (vf)((n + 127) << 23)) & (x > -87.f));
}
INLINE float largest(vf x) {
    return std::max(std::max(std::max(x[0], x[4]), std::max(x[2], x[6])), std::max(std::max(x[1], x[5]), std::max(x[3], x[7])));
}
INLINE float sum(vf x) { return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7])); }
#ifdef __AVX2__
INLINE vf add_pairs(vf a, vf b) { return (vf)_mm256_hadd_ps((__m256)a, (__m256)b); }
INLINE vi add_pairs(vi a, vi b) { return (vi)_mm256_hadd_epi32((__m256i)a, (__m256i)b); }
#endif
template <int N, class V> INLINE void sums(const V* x, float* out) {       // out[i] = sum of x[i]; fills out up to a multiple of 4
#ifdef __AVX2__
    auto at = [&](int i) { return x[std::min(i, N - 1)]; };
    const V s = add_pairs(add_pairs(at(0), at(1)), add_pairs(at(2), at(3)));
    _mm_storeu_ps(out, _mm256_castps256_ps128((__m256)to_float(s + (V)_mm256_permute2x128_si256((__m256i)s, (__m256i)s, 1))));
#else
    for (int i = 0; i < std::min(N, 4); i++) out[i] = sum(to_float(x[i]));
#endif
    if constexpr (N > 4) sums<N - 4>(x + 4, out + 4);
}

}  // namespace
