// What the maps of hyper-connections are made of: Sinkhorn's steps, logits from products, and a weighted sum of streams.
#pragma once

#include "norm.h"

namespace {

constexpr int STREAMS = 8;  // at most

// --- Sinkhorn ---

// A 4 x 4 matrix, row after row, in one vector or two. Sums over a row or a column of a, b, c, d are (a + c) + (b + d).
struct Four {
    static constexpr int PARTS = 16 / LANES;
    vf part[PARTS];
};

#if defined(__AVX512F__)
INLINE vf other_half(vf v) { return __builtin_shuffle(v, vi{8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7}); }
INLINE vf next_row(vf v) { return __builtin_shuffle(v, vi{4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11}); }
INLINE vf two_on(vf v) { return __builtin_shuffle(v, vi{2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13}); }
INLINE vf neighbour(vf v) { return __builtin_shuffle(v, vi{1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14}); }
#else
INLINE vf next_row(vf v) { return __builtin_shuffle(v, vi{4, 5, 6, 7, 0, 1, 2, 3}); }
INLINE vf two_on(vf v) { return __builtin_shuffle(v, vi{2, 3, 0, 1, 6, 7, 4, 5}); }
INLINE vf neighbour(vf v) { return __builtin_shuffle(v, vi{1, 0, 3, 2, 5, 4, 7, 6}); }
#endif

INLINE vf row_sums(vf v) {
    v = v + two_on(v);
    return v + neighbour(v);
}
INLINE vf row_largest(vf v) {
    v = max(v, two_on(v));
    return max(v, neighbour(v));
}
INLINE vf column_sums(const Four& c) {  // those of both vectors are the same
#if defined(__AVX512F__)
    vf v = c.part[0] + other_half(c.part[0]);
#else
    vf v = c.part[0] + c.part[1];
#endif
    return v + next_row(v);
}

// B matrices side by side, so that the steps of one wait while those of another run
template <int B> INLINE void sinkhorn4(const float* logits, long stride, float* out, int iters, float eps) {
    Four c[B];
    for (int b = 0; b < B; b++)
        for (int i = 0; i < Four::PARTS; i++) {
            vf v = load(logits + b * stride + i * LANES);
            vf e = exp(v - row_largest(v));
            c[b].part[i] = e / row_sums(e) + eps;
        }
    for (int step = 0;; step++) {
        for (int b = 0; b < B; b++) {
            vf total = column_sums(c[b]) + eps;
            for (vf& part : c[b].part) part = part / total;
        }
        if (step >= iters - 1) break;
        for (int b = 0; b < B; b++)
            for (vf& part : c[b].part) part = part / (row_sums(part) + eps);
    }
    for (int b = 0; b < B; b++)
        for (int i = 0; i < Four::PARTS; i++) store(out + 16 * b + i * LANES, c[b].part[i]);
}

INLINE void sinkhorn_any(const float* logits, float* c, int N, int iters, float eps) {
    for (int i = 0; i < N; i++) {
        const float* from = logits + i * N;
        vf v = load_some(from, N);
        vf e = exp(v - *std::max_element(from, from + N));
        store_some(c + i * N, e, N);
    }
    auto divide = [&](int along, int across, float add) {
        for (int i = 0; i < N; i++) {
            float total = 0;
            for (int j = 0; j < N; j++) total += c[i * across + j * along];
            for (int j = 0; j < N; j++) c[i * across + j * along] /= total + add;
        }
    };
    divide(1, N, 0);
    for (int i = 0; i < N * N; i++) c[i] += eps;
    divide(N, 1, eps);
    for (int step = 1; step < iters; step++) {
        divide(1, N, eps);
        divide(N, 1, eps);
    }
}

// `count` matrices from logits, `stride` numbers apart
inline void sinkhorn(const float* logits, long stride, float* out, long count, int N, int iters, float eps) {
    long t = 0;
    if (N == 4) {
        for (; t + 4 <= count; t += 4) sinkhorn4<4>(logits + t * stride, stride, out + t * 16, iters, eps);
        for (; t < count; t++) sinkhorn4<1>(logits + t * stride, stride, out + t * 16, iters, eps);
    }
    for (; t < count; t++) sinkhorn_any(logits + t * stride, out + t * N * N, N, iters, eps);
}

// --- logits ---

// How logits come from products: base + scale * product / rms.
struct Affine {
    const float *base, *scale;
    float norm_eps;

    // sums [wide] in place; the first `counts[0]` outputs have scale[0], and so on
    void apply(float* sums, long K, std::initializer_list<int> counts) const {
        int outputs = 0, i = 0, o = 0;
        for (int count : counts) outputs += count;
        float rho = 1.0f / std::sqrt(sums[outputs] / float(K) + norm_eps);
        for (int count : counts) {
            for (int end = o + count; o < end; o++) sums[o] = scale[i] * (sums[o] * rho) + base[o];
            i++;
        }
    }
};

// --- streams ---

// The number of streams where the compiler knows it (S), as it does of the four that models have, or else `num`.
template <int S> INLINE int streams(int num) { return S ? S : num; }

// out [M] = sum_j weight_j x_j
template <int S, class T> void read(const T* x, int num, long M, const float* weight, T* out) {
    const int N = streams<S>(num);
    for (long i = 0; i < M; i += LANES) {
        vf v = weight[0] * load_up_to(x + i, M - i);
        for (int j = 1; j < N; j++) v = v + weight[j] * load_up_to(x + j * M + i, M - i);
        store_up_to(out + i, v, M - i);
    }
}

}  // namespace
