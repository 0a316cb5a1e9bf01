// Products of matrices by strips of columns, each by one thread: what is multiplied with is packed, WIDE columns at a time.
//
// Both factors lie in units of 32 bits along the sum: numbers in FP32, or with BF16 instructions pairs of numbers in BF16. So
// tiles, strips and turned matrices are the same for both, and a sum of K numbers is one of `units<X>(K)`.
#pragma once

#include <climits>

#include "room.h"

namespace {

// A tile is ROWS x WIDE numbers: as many vectors of sums as fit into registers.
#if defined(__AVX512F__)
constexpr int ROWS = 12;
#else
constexpr int ROWS = 6;
#endif
constexpr int WIDE = 2 * LANES;
constexpr long DEEP = 256;  // units of a sum that are added up in a go: their strip stays in the first cache

INLINE long up(long x, long step) { return (x + step - 1) / step * step; }

template <class X> struct Unit {
    static constexpr int STEP = 1;
    static INLINE vf add(vf acc, vf a, vf b) { return acc + a * b; }
    static INLINE vf spread(const float* x) { return splat(*x); }
};
#if defined(__AVX512BF16__)
template <> struct Unit<bf16> {
    static constexpr int STEP = 2;
    static INLINE vf add(vf acc, vf a, vf b) { return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b); }
    static INLINE vf spread(const float* x) { return (vf)_mm512_set1_epi32(load_as<int32_t>(x)); }
    // Rounded as in `store`, but for the numbers below the smallest normal one, which the products take as zeros.
    static INLINE vh rounded(vf v) { return (vh)_mm512_cvtneps_pbh((__m512)v); }
};
#endif
template <class X> INLINE long units(long numbers) { return (numbers + Unit<X>::STEP - 1) / Unit<X>::STEP; }

// The sums of M rows (members, not an array: matmul.h says why).
template <int M, class X> struct Tile {
    vf s0 = {}, s1 = {};
    Tile<M - 1, X> below;
    INLINE void add(const float* x, long ldx, vf w0, vf w1) {
        vf a = Unit<X>::spread(x);
        s0 = Unit<X>::add(s0, a, w0), s1 = Unit<X>::add(s1, a, w1);
        below.add(x + ldx, ldx, w0, w1);
    }
    template <class Write> INLINE void write(const Write& to, long row) const {
        to(row, 0, s0), to(row, LANES, s1);
        below.write(to, row + 1);
    }
};
template <class X> struct Tile<0, X> {
    INLINE void add(const float*, long, vf, vf) {}
    template <class Write> INLINE void write(const Write&, long) const {}
};

// One product of a strip: out = keep * base + scale * x w. w [K, WIDE] packed and x [rows, K], both in units; base and out
// [rows, WIDE] of a matrix; x has whole tiles of rows.
template <class Out> struct Strip {
    const float* x;
    const Out* base;
    Out* out;
    long ldx, ld;  // ld: of base and out
    float keep, scale;
    bool rounded;  // to BF16, once the sum is whole
    long rows = LONG_MAX, columns = WIDE;  // of base and out that are there, where the last tiles are not whole
};

INLINE vf as_bf16(vf v) {
    bf16 part[LANES];
    store(part, v);
    return load(part);
}

template <class X, class Out> __attribute__((noinline)) void tile(const Strip<Out>& s, long row, const float* w, long K) {
    Tile<ROWS, X> sums;
    const float* x = s.x + row * s.ldx;
    for (long k = 0; k < K; k++, x++, w += WIDE) sums.add(x, s.ldx, load(w), load(w + LANES));
    sums.write(
        [&](long r, long c, vf sum) __attribute__((always_inline)) {
            long at = (row + r) * s.ld + c;
            vf v = sum * s.scale;
            if (s.columns == WIDE && row + ROWS <= s.rows) {
                if (s.keep != 0) v = v + s.keep * load(s.base + at);
                store(s.out + at, s.rounded ? as_bf16(v) : v);
            } else if (int there = int(std::clamp<long>(s.columns - c, 0, LANES)); there && row + r < s.rows) {
                if (s.keep != 0) v = v + s.keep * load_some(s.base + at, there);
                store_some(s.out + at, s.rounded ? as_bf16(v) : v, there);
            }
        },
        0);
}

// The strip's first `rows` rows; in FP32 the sum of K units in pieces of DEEP, in BF16 at once, to be rounded once.
template <class X = float, class Out> void strip(Strip<Out> s, long rows, const float* w, long K) {
    const bool rounded = s.rounded;
    const long deep = std::is_same<Out, float>::value ? DEEP : K;
    for (long k = 0; k < K; k += deep) {
        s.rounded = rounded && k + deep >= K;
        for (long row = 0; row < rows; row += ROWS) tile<X>(s, row, w + k * WIDE, std::min(deep, K - k));
        s.x += deep, s.base = s.out, s.keep = 1;
    }
}

// to[j][i] = from[i][j] for 8 x 8 numbers
INLINE void turn8(const float* from, long ld, float* to, long ldo) {
    __m256 r[8], t[8];
    for (int i = 0; i < 8; i++) r[i] = _mm256_loadu_ps(from + i * ld);
    for (int i = 0; i < 4; i++) {
        t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
    }
    for (int i = 0; i < 2; i++) {
        __m256 *a = t + 4 * i, *o = r + 4 * i;
        o[0] = _mm256_shuffle_ps(a[0], a[2], 0x44), o[1] = _mm256_shuffle_ps(a[0], a[2], 0xee);
        o[2] = _mm256_shuffle_ps(a[1], a[3], 0x44), o[3] = _mm256_shuffle_ps(a[1], a[3], 0xee);
    }
    for (int i = 0; i < 4; i++) {
        _mm256_storeu_ps(to + i * ldo, _mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
        _mm256_storeu_ps(to + (i + 4) * ldo, _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
    }
}

// to [columns, rows] = from [rows, columns] turned
void turn(const float* from, long ld, long rows, long columns, float* to, long ldo) {
    for (long i = 0; i < rows; i += 8)
        for (long j = 0; j < columns; j += 8) {
            if (i + 8 <= rows && j + 8 <= columns) turn8(from + i * ld + j, ld, to + j * ldo + i, ldo);
            else
                for (long r = i; r < std::min(i + 8, rows); r++)
                    for (long c = j; c < std::min(j + 8, columns); c++) to[c * ldo + r] = from[r * ld + c];
        }
}

}  // namespace
