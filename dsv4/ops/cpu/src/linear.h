// y = x W^T, in strips of outputs and slabs of rows, which the threads share.
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

}  // namespace
