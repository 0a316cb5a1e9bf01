// y = x W^T, in strips of outputs and slabs of rows, which the threads share; and the norm and rotation of a row.
#pragma once

#include "matmul.h"

namespace {

// A weight as Python gives it.
struct Weight {
    Matrix matrix;
    int dtype;
    long rows;
};

// Rows of x have stride ldx, rows of y stride ldy.
template <class T> void linear(const T* x, long M, long ldx, const Weight& weight, T* y, long ldy) {
    const Matrix& w = weight.matrix;
    long N = weight.rows;
    typedef typename Multiplied<T>::type X;
    long K = w.columns, ld = ldx;
    if (!M || !N) return;
    std::vector<X> room;
    const X* rows;
    if constexpr (std::is_same<X, T>::value) rows = x;
    else {
        room.resize(M * K);
        for (long m = 0; m < M; m++)
            for (long k = 0; k < K; k += LANES) {
                int count = int(std::min<long>(LANES, K - k));
                store_some(room.data() + m * K + k, load_some(x + m * ldx + k, count), count);
            }
        rows = room.data(), ld = K;
    }
    long threads = omp_get_max_threads();
    long strip = std::clamp<long>((N / (threads * 4) + NR - 1) / NR * NR, NR, std::max<long>(NR, PANEL / K / NR * NR));
    long strips = (N + strip - 1) / strip, slab = M > 256 ? 24 * MR : M, slabs = (M + slab - 1) / slab;
#pragma omp parallel if (M * N * K > 60000)
    {
        X* panel = kept_room<0, X>(PANEL + NR * K);
#pragma omp for schedule(dynamic, 1) collapse(2)
        for (long s = 0; s < strips; s++)
            for (long b = 0; b < slabs; b++) {
                long m = b * slab, n = s * strip;
                product(weight.dtype, std::min(slab, M - m), rows + m * ld, ld, w, n, std::min(n + strip, N), y + m * ldy, ldy, panel);
            }
    }
}

// x / rms(x) * gain in place, rounded once; gain may be none.
template <class T> INLINE void normalise(T* x, long D, const float* gain, float eps) {
    vf squares = {};
    for (long c = 0; c < D; c += LANES) {
        vf v = load_some(x + c, int(std::min<long>(LANES, D - c)));
        squares += v * v;
    }
    float rho = 1.0f / std::sqrt(sum(squares) / float(D) + eps);
    for (long c = 0; c < D; c += LANES) {
        int count = int(std::min<long>(LANES, D - c));
        vf v = load_some(x + c, count) * rho;
        if (gain) v = v * load_some(gain + c, count);
        store_some(x + c, v, count);
    }
}

// The last 2 * pairs channels of x, as complex numbers, times turn (or its conjugate), into out.
template <class T> INLINE void turned(const T* x, long D, const float* turn, long pairs, bool back, T* out) {
    if (out != x) std::memcpy(out, x, (D - 2 * pairs) * sizeof(T));
    for (long i = 0; i < pairs; i++) {
        long c = D - 2 * pairs + 2 * i;
        float a = widen(x[c]), b = widen(x[c + 1]), re = turn[2 * i], im = back ? -turn[2 * i + 1] : turn[2 * i + 1];
        store(out + c, a * re - b * im);
        store(out + c + 1, a * im + b * re);
    }
}

}  // namespace
