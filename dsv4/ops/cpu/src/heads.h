// Products of queries with keys where every head of a query meets the same keys: heads lie in the lanes of a vector,
// and the numbers of a key are spread to all of them. So keys are read as they lie, and nothing is summed over lanes.
//
// A product is the sum over ascending d in one lane (with BF16 instructions: over ascending pairs). It does not depend
// on the tile that it is computed in.
#pragma once

#include "matmul.h"

namespace {

typedef float v8 __attribute__((vector_size(32)));

template <class V> constexpr int lanes() { return sizeof(V) / 4; }

constexpr long COLUMNS = 2 * LANES;  // of a panel: two vectors of heads
constexpr int KEYS = 8;              // of a tile

// Eight heads or fewer take half of an AVX-512 vector, in which a product takes half the time where it matters.
INLINE long padded_heads(long heads) { return heads <= 8 ? 8 : (heads + LANES - 1) / LANES * LANES; }
INLINE long panel_columns(long left) { return left >= COLUMNS ? COLUMNS : std::min<long>(left, LANES); }

// acc + a * b, rounded once: said, where the compiler might choose otherwise from place to place.
INLINE vf fused(vf a, vf b, vf acc) {
#if defined(__AVX512F__)
    return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)acc);
#else
    return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)acc);
#endif
}
#if defined(__AVX512F__)
INLINE v8 fused(v8 a, v8 b, v8 acc) { return (v8)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)acc); }
#endif

// The halves of a vector, the other way round.
INLINE vf swapped(vf v) {
#if defined(__AVX512F__)
    return (vf)_mm512_shuffle_f32x4((__m512)v, (__m512)v, 0x4e);
#else
    return v;
#endif
}

template <class X> struct Spread;  // one number of a key, or a pair, times a vector of heads

template <> struct Spread<float> {
    static constexpr int STEP = 1;
    template <class V> static INLINE V add(V acc, V heads, const float* key) { return fused(heads, *key - V{}, acc); }
};

#if defined(__AVX512BF16__)
template <> struct Spread<bf16> {
    static constexpr int STEP = 2;
    static INLINE vf add(vf acc, vf heads, const bf16* key) {
        return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)heads, (__m512bh)_mm512_set1_epi32(load_as<int32_t>(key)));
    }
    static INLINE v8 add(v8 acc, v8 heads, const bf16* key) {
        return (v8)_mm256_dpbf16_ps((__m256)acc, (__m256bh)heads, (__m256bh)_mm256_set1_epi32(load_as<int32_t>(key)));
    }
};
#endif

// --- queries in panels, one after the other, the last may be narrower: each [D / STEP][COLUMNS heads][STEP] ---

// Eight units of a row, 32 bits each: numbers, or with BF16 instructions pairs of them.
template <class X> INLINE v8 units(const float* row) { return load_as<v8>(row); }
template <class X> INLINE v8 units(const bf16* row) {
    if constexpr (std::is_same<X, bf16>::value) return load_as<v8>(row);
    else return (v8)_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_as<__m128i>(row)), 16);
}

INLINE void transpose(v8* r) {
    __m256 a[8], b[8];
    for (int i = 0; i < 8; i += 2) {
        a[i] = _mm256_unpacklo_ps((__m256)r[i], (__m256)r[i + 1]);
        a[i + 1] = _mm256_unpackhi_ps((__m256)r[i], (__m256)r[i + 1]);
    }
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; j++) {
            b[i + 2 * j] = _mm256_shuffle_ps(a[i + j], a[i + j + 2], 0x44);
            b[i + 2 * j + 1] = _mm256_shuffle_ps(a[i + j], a[i + j + 2], 0xee);
        }
    for (int i = 0; i < 4; i++) {
        r[i] = (v8)_mm256_permute2f128_ps(b[i], b[i + 4], 0x20);
        r[i + 4] = (v8)_mm256_permute2f128_ps(b[i], b[i + 4], 0x31);
    }
}

// `rows` has `columns` addresses (a multiple of the lanes), null for a head that is not there.
template <class X, class T> void lay_panels(const T* const* rows, long columns, long D, X* out) {
    constexpr int STEP = Spread<X>::STEP;
    long even = D / (8 * STEP) * 8 * STEP;
    for (long c = 0; c < columns; c += panel_columns(columns - c)) {
        long wide = panel_columns(columns - c);
        X* panel = out + c * D;
        for (long i = 0; i < wide; i += 8)
            for (long d = 0; d < even; d += 8 * STEP) {
                v8 r[8];
                for (int lane = 0; lane < 8; lane++) {
                    const T* row = rows[c + i + lane];
                    r[lane] = row ? units<X>(row + d) : v8{};
                }
                transpose(r);
                for (int u = 0; u < 8; u++) std::memcpy(panel + (d + u * STEP) * wide + i * STEP, &r[u], sizeof r[u]);
            }
        for (long d = even; d < D; d++)
            for (long i = 0; i < wide; i++) {
                const T* row = rows[c + i];
                X number = 0;
                if constexpr (std::is_same<X, T>::value) number = row ? row[d] : 0;
                else number = row ? widen(row[d]) : 0;
                panel[d / STEP * STEP * wide + i * STEP + d % STEP] = number;
            }
    }
}

// acc[m][n]: the products of M keys with N vectors of heads, a panel that is N vectors wide.
template <int M, int N, class V, class X>
INLINE void spread(const X* panel, const X* const* keys, long D, V (*acc)[N]) {
    constexpr int STEP = Spread<X>::STEP, L = lanes<V>();
    if constexpr (LANES == 8 && M * N > 8) {  // more sums than there are registers
        spread<M / 2, N>(panel, keys, D, acc);
        spread<M / 2, N>(panel, keys + M / 2, D, acc + M / 2);
    } else {
        V sums[M][N];
        for (int m = 0; m < M; m++)
            for (int n = 0; n < N; n++) sums[m][n] = V{};
        for (long d = 0; d < D; d += STEP) {
            V heads[N];
            for (int n = 0; n < N; n++) heads[n] = load_as<V>(panel + d * N * L + n * L * STEP);
            for (int m = 0; m < M; m++)
                for (int n = 0; n < N; n++) sums[m][n] = Spread<X>::add(sums[m][n], heads[n], keys[m] + d);
        }
        for (int m = 0; m < M; m++)
            for (int n = 0; n < N; n++) acc[m][n] = sums[m][n];
    }
}

// Calls f.panel<V, N>(its first column, where it lies) for every panel.
template <class X, class F> INLINE void for_panels(const X* panels, long columns, long D, F f) {
    for (long c = 0; c < columns;) {
        long wide = panel_columns(columns - c);
        const X* panel = panels + c * D;
        if (wide == COLUMNS) f.template panel<vf, 2>(c, panel);
        else if (wide == LANES) f.template panel<vf, 1>(c, panel);
        else f.template panel<v8, 1>(c, panel);
        c += wide;
    }
}

// --- mixing rows ---

#if defined(__AVX512F__)
constexpr int MIX_HEADS = 8, MIX_WIDE = 2;
#else
constexpr int MIX_HEADS = 4, MIX_WIDE = 2;
#endif

// mix[h][d] = sum over keys of p[key][h] row[key][d], for MIX_HEADS heads and N vectors of the rows; p has `heads` numbers
// for a key.
template <int N, class X>
INLINE void mix_tile(const float* p, long heads, const X* const* rows, long count, long d, float* mix, long width) {
    vf acc[MIX_HEADS][N] = {};
    for (long k = 0; k < count; k++) {
        vf row[N];
        for (int n = 0; n < N; n++) row[n] = load(rows[k] + d + n * LANES);
        for (int h = 0; h < MIX_HEADS; h++)
            for (int n = 0; n < N; n++) acc[h][n] = fused(splat(p[k * heads + h]), row[n], acc[h][n]);
    }
    for (int h = 0; h < MIX_HEADS; h++)
        for (int n = 0; n < N; n++) store(mix + h * width + d + n * LANES, acc[h][n]);
}

}  // namespace
