// y = x W^T, in strips of outputs and slabs of rows, which the threads share.
#include "matmul.h"

namespace {

template <int D, class T> void linear(const T* x, long M, const Matrix& w, long N, T* y) {
    typedef typename Multiplied<T>::type X;
    long K = w.columns;
    std::vector<X> room;
    const X* rows = as_multiplied<X>(x, M * K, room);
    long threads = omp_get_max_threads();
    long strip = std::clamp<long>((N / (threads * 4) + NR - 1) / NR * NR, NR, std::max<long>(NR, PANEL / K / NR * NR));
    long strips = (N + strip - 1) / strip, slab = M > 256 ? 24 * MR : M, slabs = (M + slab - 1) / slab;
#pragma omp parallel if (M * N * K > 20000)
    {
        std::vector<X> panel(PANEL + NR * K);
#pragma omp for schedule(dynamic, 1) collapse(2)
        for (long s = 0; s < strips; s++)
            for (long b = 0; b < slabs; b++) {
                long m = b * slab, n = s * strip;
                product<D>(std::min(slab, M - m), rows + m * K, K, w, n, std::min(n + strip, N), y + m * N, N, panel.data());
            }
    }
}

template <class T> void by_weight(const T* x, long M, const Matrix& w, int dtype, long N, T* y) {
    switch (dtype) {
        case F32: return linear<F32>(x, M, w, N, y);
        case BF16: return linear<BF16>(x, M, w, N, y);
        case FP8: return linear<FP8>(x, M, w, N, y);
        default: return linear<FP4>(x, M, w, N, y);
    }
}

}  // namespace

// x [M, K] -> y [M, N], both FP32 or both BF16; weights [N, K]
EXPORT(linear)
(const void* x, int is_bf16, long M, long K, const void* data, const void* scales, int dtype, long stride, long N, void* y) {
    Matrix w{data, static_cast<const uint8_t*>(scales), K, stride};
    if (is_bf16) by_weight(static_cast<const bf16*>(x), M, w, dtype, N, static_cast<bf16*>(y));
    else by_weight(static_cast<const float*>(x), M, w, dtype, N, static_cast<float*>(y));
}
