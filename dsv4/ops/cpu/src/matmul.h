// Products of rows with rows, out[m][n] = x[m] . w[n], both contiguous along the sum (y = x W^T), for weights in FP32,
// BF16, FP8 or FP4.
//
// One accumulator vector belongs to one output: its lanes sum the products of ascending k, and are then added by halves.
// So a number of the output does not depend on the tile that it is computed in, nor on what is computed beside it.
// BF16 rows are multiplied as they are where the machine can (sums in FP32), and widened to FP32 where it cannot.
#pragma once

#include "simd.h"

namespace {

enum Dtype { F32, BF16, FP8, FP4 };  // as in library.py

// --- what is multiplied: vectors of FP32, or of pairs of BF16 ---

template <class X> struct Dot;

template <> struct Dot<float> {
    typedef vf reg;
    static constexpr int STEP = LANES;
    static INLINE reg get(const float* p) { return load(p); }
    static INLINE reg join(const vf* parts) { return parts[0]; }
    static INLINE vf add(vf acc, reg a, reg b) { return acc + a * b; }
};

#if defined(__AVX512BF16__)
template <> struct Dot<bf16> {
    typedef __m512bh reg;
    static constexpr int STEP = 2 * LANES;
    static INLINE reg get(const bf16* p) { return load_as<reg>(p); }
    static INLINE reg join(const vf* parts) { return _mm512_cvtne2ps_pbh((__m512)parts[1], (__m512)parts[0]); }
    static INLINE vf add(vf acc, reg a, reg b) { return (vf)_mm512_dpbf16_ps((__m512)acc, a, b); }
};
typedef bf16 Product16;  // what BF16 rows are multiplied as
#else
typedef float Product16;
#endif

// --- rows of weights: `at(k)` is one vector of numbers from k on, `some` the last, shorter one ---

template <class T> struct PlainRow {
    const T* p;
    INLINE vf at(long k) const { return load(p + k); }
    INLINE vf some(long k, int count) const { return load_some(p + k, count); }
};

INLINE float power_of_two(uint8_t code) {  // UE8M0
    uint32_t bits = code ? uint32_t(code) << 23 : 0x00400000;
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
}

// e4m3 codes, a scale for every 128 columns
struct Fp8Row {
    const uint8_t *p, *scales;
    INLINE vf numbers(vb codes) const {
        vh c = __builtin_convertvector(codes, vh);
        vh half = ((c & 0x80) << 8) | ((c & 0x7f) << 7);  // the same number * 2^-8 as an IEEE half
#if defined(__AVX512F__)
        return (vf)_mm512_cvtph_ps((__m256i)half);
#else
        return (vf)_mm256_cvtph_ps((__m128i)half);
#endif
    }
    INLINE vf at(long k) const { return numbers(load_as<vb>(p + k)) * 256.0f * power_of_two(scales[k / 128]); }
    INLINE vf some(long k, int count) const {
        uint8_t part[LANES] = {};
        std::memcpy(part, p + k, count);
        return numbers(load_as<vb>(part)) * 256.0f * power_of_two(scales[k / 128]);
    }
};

// e2m1 codes, two to a byte (the even column low), a scale for every 32 columns
struct Fp4Row {
    const uint8_t *p, *scales;
    INLINE vf numbers(const uint8_t* bytes) const {
#if defined(__AVX512F__)
        __m128i pair = _mm_cvtsi64_si128(load_as<int64_t>(bytes));  // 8 bytes: 16 codes
#else
        __m128i pair = _mm_cvtsi32_si128(load_as<int32_t>(bytes));  // 4 bytes: 8 codes
#endif
        __m128i nibble = _mm_set1_epi8(15);
        __m128i codes = _mm_unpacklo_epi8(_mm_and_si128(pair, nibble), _mm_and_si128(_mm_srli_epi16(pair, 4), nibble));
#if defined(__AVX512F__)
        vf table = {0, .5f, 1, 1.5f, 2, 3, 4, 6, -0.f, -.5f, -1, -1.5f, -2, -3, -4, -6};
        return (vf)_mm512_permutexvar_ps(_mm512_cvtepu8_epi32(codes), (__m512)table);
#else
        vf table = {0, .5f, 1, 1.5f, 2, 3, 4, 6};
        __m256i code = _mm256_cvtepu8_epi32(codes);
        vf size = (vf)_mm256_permutevar8x32_ps((__m256)table, code);  // by the low three bits
        return as_float(as_bits(size) | (((vu)code & 8) << 28));
#endif
    }
    INLINE vf at(long k) const { return numbers(p + k / 2) * power_of_two(scales[k / 32]); }
    INLINE vf some(long k, int count) const {
        uint8_t part[LANES / 2] = {};
        std::memcpy(part, p + k / 2, (count + 1) / 2);
        return numbers(part) * power_of_two(scales[k / 32]);
    }
};

}  // namespace

namespace DSV4_ISA {

// A matrix [rows, columns] in any of the formats.
struct Matrix {
    const void* data;
    const uint8_t* scales;  // FP8, FP4
    long columns, stride;   // stride: numbers from row to row (in FP8 and FP4 the rows lie one after the other)

    // The matrix from row n on (FP8: n at the edge of a block of 128).
    Matrix from(int dtype, long n) const {
        Matrix out = *this;
        const char* bytes = static_cast<const char*>(data);
        long wide = columns;
        if (dtype == F32) out.data = bytes + n * stride * 4;
        else if (dtype == BF16) out.data = bytes + n * stride * 2;
        else if (dtype == FP8) out.data = bytes + n * wide, out.scales += n / 128 * ((wide + 127) / 128);
        else out.data = bytes + n * (wide / 2), out.scales += n * ((wide + 31) / 32);
        return out;
    }

    template <int D> INLINE auto row(long n) const {
        if constexpr (D == F32) return PlainRow<float>{static_cast<const float*>(data) + n * stride};
        else if constexpr (D == BF16) return PlainRow<bf16>{static_cast<const bf16*>(data) + n * stride};
        else if constexpr (D == FP8)
            return Fp8Row{static_cast<const uint8_t*>(data) + n * columns, scales + n / 128 * ((columns + 127) / 128)};
        else return Fp4Row{static_cast<const uint8_t*>(data) + n * (columns / 2), scales + n * ((columns + 31) / 32)};
    }
};

}  // namespace DSV4_ISA
using DSV4_ISA::Matrix;

namespace {

// A vector of what is multiplied, from k on: of a plain row of the same numbers, or widened from any other.
template <class X, class Row> INLINE typename Dot<X>::reg piece(const Row& row, long k) {
    if constexpr (std::is_same<Row, PlainRow<X>>::value) return Dot<X>::get(row.p + k);
    else {
        vf parts[Dot<X>::STEP / LANES];
        for (int i = 0; i < Dot<X>::STEP / LANES; i++) parts[i] = row.at(k + i * LANES);
        return Dot<X>::join(parts);
    }
}

template <class X, class Row> INLINE typename Dot<X>::reg last_piece(const Row& row, long k, long K) {
    vf parts[Dot<X>::STEP / LANES];
    for (int i = 0; i < Dot<X>::STEP / LANES; i++) {
        long from = k + i * LANES;
        parts[i] = from + LANES <= K ? row.at(from) : (from < K ? row.some(from, int(K - from)) : vf{});
    }
    return Dot<X>::join(parts);
}

// --- one tile ---

#if defined(__AVX512F__)
constexpr int MR = 6, NR = 4;
#else
constexpr int MR = 2, NR = 4;
#endif

// The sums over lanes of four vectors, each by halves as `sum` has it.
INLINE void sum4(const vf* a, float* out) {
#if defined(__AVX512F__)
    __m512 a0 = (__m512)a[0], a1 = (__m512)a[1], a2 = (__m512)a[2], a3 = (__m512)a[3];
    __m512 p = _mm512_add_ps(_mm512_shuffle_f32x4(a0, a1, 0x44), _mm512_shuffle_f32x4(a0, a1, 0xee));  // 8 and 8 left
    __m512 q = _mm512_add_ps(_mm512_shuffle_f32x4(a2, a3, 0x44), _mm512_shuffle_f32x4(a2, a3, 0xee));
    __m512 v = _mm512_add_ps(_mm512_shuffle_f32x4(p, q, 0x88), _mm512_shuffle_f32x4(p, q, 0xdd));  // 4 of each
    v = _mm512_add_ps(v, _mm512_permute_ps(v, 0x4e));
    v = _mm512_add_ps(v, _mm512_permute_ps(v, 0xb1));
    float part[16];
    _mm512_storeu_ps(part, v);
    for (int i = 0; i < 4; i++) out[i] = part[4 * i];
#else
    for (int i = 0; i < 4; i += 2) {
        __m256 b = (__m256)a[i], c = (__m256)a[i + 1];
        __m256 v = _mm256_add_ps(_mm256_permute2f128_ps(b, c, 0x20), _mm256_permute2f128_ps(b, c, 0x31));
        v = _mm256_add_ps(v, _mm256_permute_ps(v, 0x4e));
        v = _mm256_add_ps(v, _mm256_permute_ps(v, 0xb1));
        float part[8];
        _mm256_storeu_ps(part, v);
        out[i] = part[0], out[i + 1] = part[4];
    }
#endif
}

// out[m][n] for M rows of x (stride ldx) and NR rows w; the first `wanted` columns of out (stride ldo) are written.
template <int M, class X, class Row, class Out>
INLINE void tile(const X* x, long ldx, const Row* w, long K, Out* out, long ldo, int wanted) {
    typedef Dot<X> D;
    vf acc[M][NR] = {};
    long k = 0;
    for (; k + D::STEP <= K; k += D::STEP) {
        typename D::reg row[NR];
        for (int n = 0; n < NR; n++) row[n] = piece<X>(w[n], k);
        for (int m = 0; m < M; m++) {
            typename D::reg a = D::get(x + m * ldx + k);
            for (int n = 0; n < NR; n++) acc[m][n] = D::add(acc[m][n], a, row[n]);
        }
    }
    if (k < K) {
        typename D::reg row[NR];
        for (int n = 0; n < NR; n++) row[n] = last_piece<X>(w[n], k, K);
        for (int m = 0; m < M; m++) {
            typename D::reg a = last_piece<X>(PlainRow<X>{x + m * ldx}, k, K);
            for (int n = 0; n < NR; n++) acc[m][n] = D::add(acc[m][n], a, row[n]);
        }
    }
    for (int m = 0; m < M; m++) {
        float sums[NR];
        sum4(acc[m], sums);
        for (int n = 0; n < wanted; n++) store(out + m * ldo + n, sums[n]);
    }
}

template <class X, class Row, class Out>
INLINE void tiles(long M, const X* x, long ldx, const Row* w, long K, Out* out, long ldo, int wanted) {
    long m = 0;
    for (; m + MR <= M; m += MR) tile<MR>(x + m * ldx, ldx, w, K, out + m * ldo, ldo, wanted);
    for (; m + 2 <= M; m += 2) tile<2>(x + m * ldx, ldx, w, K, out + m * ldo, ldo, wanted);
    for (; m < M; m++) tile<1>(x + m * ldx, ldx, w, K, out + m * ldo, ldo, wanted);
}

constexpr long PANEL = 1 << 15;  // numbers of weights that are widened at a time: they stay in the second cache

// Rows of x as what they are multiplied as: themselves, or widened into `room`.
template <class X, class T> INLINE const X* as_multiplied(const T* x, long count, std::vector<X>& room) {
    if constexpr (std::is_same<X, T>::value) return x;
    else {
        room.resize(count);
        long i = 0;
        for (; i + LANES <= count; i += LANES) store(room.data() + i, load(x + i));
        for (; i < count; i++) room[i] = widen(x[i]);
        return room.data();
    }
}
template <class T> struct Multiplied { typedef T type; };
template <> struct Multiplied<bf16> { typedef Product16 type; };

}  // namespace

namespace DSV4_ISA {

// out[m][n] for the rows n0 <= n < n1 of the weights, of format `dtype`, and all M rows of x; out has stride ldo. `panel` has
// room for PANEL + NR * K numbers. Compiled once, in matmul.cpp.
void product(int dtype, long M, const float* x, long ldx, const Matrix& w, long n0, long n1, float* out, long ldo, float* panel);
void product(int dtype, long M, const Product16* x, long ldx, const Matrix& w, long n0, long n1, bf16* out, long ldo,
             Product16* panel);

}  // namespace DSV4_ISA
using DSV4_ISA::product;
