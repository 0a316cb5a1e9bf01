// Products of queries with keys where every head of a query meets the same keys: heads lie in the lanes of a vector, and
// the numbers of a key are spread to all of them. So keys are read as they lie, and nothing is summed over lanes.
//
// A product is the sum over ascending d in one lane (with BF16 instructions: over ascending pairs). It does not depend
// on the tile that it is computed in.
#pragma once

#include "matmul.h"

namespace {

typedef float v8 __attribute__((vector_size(32)));

template <class V> constexpr int lanes() { return sizeof(V) / 4; }

// Eight heads or fewer are held in half of an AVX-512 vector: there are two of these products in the time of a whole one.
constexpr long COLUMNS = 2 * LANES;  // of a panel: two vectors of heads
INLINE long padded_heads(long heads) { return heads <= 8 ? 8 : (heads + LANES - 1) / LANES * LANES; }
INLINE long panel_columns(long left) { return left >= COLUMNS ? COLUMNS : std::min<long>(left, LANES); }

template <class V> INLINE V widest(V a, V b) { return a > b ? a : b; }

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

// --- queries in panels: [D / STEP][columns][STEP], a panel of COLUMNS heads after the other, the last may be narrower ---

// `rows` has `columns` addresses (a multiple of the lanes), null for a head that is not there.
template <class X, class T> void lay_panels(const T* const* rows, long columns, long D, X* out) {
    constexpr int STEP = Spread<X>::STEP;
    for (long c = 0; c < columns;) {
        long wide = panel_columns(columns - c);
        for (long d = 0; d < D; d += STEP)
            for (long i = 0; i < wide; i++)
                for (int s = 0; s < STEP; s++) {
                    X number = 0;
                    if (const T* row = rows[c + i]) {
                        if constexpr (std::is_same<X, T>::value) number = row[d + s];
                        else number = widen(row[d + s]);
                    }
                    out[c * D + d * wide + i * STEP + s] = number;
                }
        c += wide;
    }
}

// acc[m][n]: the products of M keys with N vectors of heads, a panel that is N vectors wide.
template <int M, int N, class V, class X> INLINE void spread(const X* panel, const X* const* keys, long D, V (&acc)[M][N]) {
    constexpr int STEP = Spread<X>::STEP, L = lanes<V>();
    for (int m = 0; m < M; m++)
        for (int n = 0; n < N; n++) acc[m][n] = V{};
    for (long d = 0; d < D; d += STEP) {
        V heads[N];
        for (int n = 0; n < N; n++) heads[n] = load_as<V>(panel + d * N * L + n * L * STEP);
        for (int m = 0; m < M; m++)
            for (int n = 0; n < N; n++) acc[m][n] = Spread<X>::add(acc[m][n], heads[n], keys[m] + d);
    }
}

constexpr int KEYS = 8;  // of a tile

// Calls f.tile<V, N>(first column, its panel) for every panel.
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

}  // namespace
