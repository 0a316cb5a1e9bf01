// Vectors of the instruction set that this file is compiled for, and the number formats that they are filled from.
//
// Every kernel file is compiled once for each set of instructions (build.py), with DSV4_ISA naming it: avx2, avx512 or
// avx512bf16. Nothing here is chosen by #ifdef but the width of a vector and the instructions that only some have.
// Sums are taken in an order that depends on the length of the sum alone: not on what else is computed beside it, and
// not on the number of threads.
#pragma once

#include <immintrin.h>
#include <omp.h>

#include <algorithm>
#include <climits>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#define DSV4_JOIN(a, b) a##_##b
#define DSV4_NAME(name, isa) DSV4_JOIN(name, isa)
// A function that Python calls: its name ends in the instruction set.
#define EXPORT(name) extern "C" __attribute__((visibility("default"))) void DSV4_NAME(name, DSV4_ISA)
#define INLINE inline __attribute__((always_inline))

namespace {  // each object file has its own

#if defined(__AVX512F__)
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif

typedef float vf __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));
typedef uint32_t vu __attribute__((vector_size(4 * LANES)));
typedef uint16_t vh __attribute__((vector_size(2 * LANES)));
typedef uint8_t vb __attribute__((vector_size(LANES)));
typedef uint16_t bf16;  // its bits

// --- loads and stores ---

template <class V> INLINE V load_as(const void* p) {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

INLINE vf splat(float x) { return x - vf{}; }
INLINE vf as_float(vu v) { return (vf)v; }  // a cast between vectors keeps the bits
INLINE vu as_bits(vf v) { return (vu)v; }

// Between widths, a lane each; narrowing drops the upper bits, of which none may be set. (Of __builtin_convertvector GCC makes
// four to six instructions here.)
#if defined(__AVX512F__)
INLINE vu widen(vh v) { return (vu)_mm512_cvtepu16_epi32((__m256i)v); }
INLINE vu widen(vb v) { return (vu)_mm512_cvtepu8_epi32((__m128i)v); }
INLINE vh to_halves(vu v) { return (vh)_mm512_cvtepi32_epi16((__m512i)v); }
INLINE vb to_bytes(vu v) { return (vb)_mm512_cvtepi32_epi8((__m512i)v); }
#else
INLINE vu widen(vh v) { return (vu)_mm256_cvtepu16_epi32((__m128i)v); }
INLINE vu widen(vb v) { return (vu)_mm256_cvtepu8_epi32(_mm_cvtsi64_si128((long long)v)); }
INLINE vh to_halves(vu v) {
    return (vh)_mm_packus_epi32(_mm256_castsi256_si128((__m256i)v), _mm256_extracti128_si256((__m256i)v, 1));
}
INLINE vb to_bytes(vu v) { return (vb)_mm_cvtsi128_si64(_mm_packus_epi16((__m128i)to_halves(v), __m128i{})); }
#endif

INLINE vf load(const float* p) { return load_as<vf>(p); }
INLINE vf load(const bf16* p) { return as_float(widen(load_as<vh>(p)) << 16); }

// The first `count` numbers, zeros after them.
template <class T> INLINE vf load_some(const T* p, int count) {
    T part[LANES] = {};
    std::memcpy(part, p, count * sizeof(T));
    return load(part);
}

INLINE float widen(float x) { return x; }
INLINE float widen(bf16 x) {
    uint32_t bits = uint32_t(x) << 16;
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
}

// Round to the nearest bf16, ties to even; a NaN stays one.
INLINE bf16 narrow(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return bf16(bits >> 16) | 0x40;
    return bf16((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

INLINE void store(float* p, vf v) { std::memcpy(p, &v, sizeof v); }
INLINE void store(bf16* p, vf v) {
    vu bits = as_bits(v);
    vu rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    vu nan = (bits >> 16) | 0x40;
    vu is_nan = (vu)((bits & 0x7fffffff) > 0x7f800000);
    vh out = to_halves(((rounded & ~is_nan) | (nan & is_nan)) & 0xffff);
    std::memcpy(p, &out, sizeof out);
}
INLINE void store(float* p, float x) { *p = x; }
INLINE void store(bf16* p, float x) { *p = narrow(x); }

template <class T> INLINE void store_some(T* p, vf v, int count) {
    T part[LANES];
    store(part, v);
    std::memcpy(p, part, count * sizeof(T));
}

// --- sums over lanes, always in the same order: halves, quarters, ... ---

INLINE float sum(vf v) {
    float part[LANES];
    store(part, v);
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) part[i] += part[i + half];
    return part[0];
}

INLINE vf max(vf a, vf b) { return a > b ? a : b; }
INLINE vf min(vf a, vf b) { return a < b ? a : b; }

// --- functions ---

// e^x to 2 units in the last place; 0 below -103, so also for -inf; NaN stays NaN.
INLINE vf exp(vf x) {
    vf low = splat(-104.0f), high = splat(89.0f);
    vf clamped = x < low ? low : (x > high ? high : x);
    vf n = clamped * 1.44269504088896341f + 12582912.0f;  // 1.5 * 2^23: the sum's low bits are the nearest integer
    vi whole = (vi)as_bits(n) - 0x4b400000;
    n = n - 12582912.0f;
    vf r = clamped - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    vf p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    // two steps, so that results below the smallest normal number come out right
    vi first = whole / 2, second = whole - first;
    vf scaled = p * as_float((vu)((first + 127) << 23)) * as_float((vu)((second + 127) << 23));
    return x != x ? x : scaled;
}

INLINE vf sigmoid(vf x) { return 1.0f / (1.0f + exp(-x)); }

INLINE vf sqrt(vf x) {
#if defined(__AVX512F__)
    return (vf)_mm512_sqrt_ps((__m512)x);
#else
    return (vf)_mm256_sqrt_ps((__m256)x);
#endif
}

// log(1 + x) to 3 units in the last place, for finite x >= 0; NaN stays NaN.
INLINE vf log1p(vf x) {
    vf u = 1.0f + x, lost = x - (u - 1.0f);
    vi exponent = (vi)(as_bits(u) - 0x3f3504f3) >> 23;  // so that the rest lies in [sqrt(1/2), sqrt(2))
    vf m = as_float(as_bits(u) - (vu)(exponent << 23)) - 1.0f;
    vf e = __builtin_convertvector(exponent, vf), z = m * m;
    vf p = splat(7.0376836292e-2f);
    p = p * m - 1.1514610310e-1f;
    p = p * m + 1.1676998740e-1f;
    p = p * m - 1.2420140846e-1f;
    p = p * m + 1.4249322787e-1f;
    p = p * m - 1.6668057665e-1f;
    p = p * m + 2.0000714765e-1f;
    p = p * m - 2.4999993993e-1f;
    p = p * m + 3.3333331174e-1f;
    p = p * m * z - e * 2.12194440e-4f - 0.5f * z;
    return x != x ? x : (m + p) + e * 0.693359375f + lost / u;
}

}  // namespace
