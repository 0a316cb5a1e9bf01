// y = x W^T, in strips of outputs and slabs of rows, which the threads share.
#pragma once

#include "matmul.h"
#include "room.h"

namespace {

// A weight as Python gives it.
struct Weight {
    Matrix matrix;
    int dtype;
    long rows;
};

// One product of several: rows of x have stride ldx, rows of y stride ldy.
template <class T> struct Job {
    const T* x;
    long ldx;
    Weight w;
    T* y;
    long ldy;
};

// All products of M rows each, their strips and slabs shared by the threads in one go.
template <class T> void linear(long M, const std::vector<Job<T>>& jobs) {
    typedef typename Multiplied<T>::type X;
    struct Strip {
        const X* x;
        long ldx;
        const Job<T>* job;
        long n0, n1;
    };
    if (!M) return;
    long work = 0, widest = 0, threads = omp_get_max_threads();
    std::vector<Strip> strips;
    std::vector<std::vector<X>> rooms(jobs.size());
    for (size_t j = 0; j < jobs.size(); j++) {
        const Job<T>& job = jobs[j];
        long K = job.w.matrix.columns, N = job.w.rows, ld = job.ldx;
        const X* rows;
        if constexpr (std::is_same<X, T>::value) rows = job.x;
        else {
            rooms[j].resize(M * K);
            for (long m = 0; m < M; m++) {
                const T* from = job.x + m * job.ldx;
                X* to = rooms[j].data() + m * K;
                long k = 0;
                for (; k + LANES <= K; k += LANES) store(to + k, load(from + k));
                for (; k < K; k++) to[k] = widen(from[k]);
            }
            rows = rooms[j].data(), ld = K;
        }
        long most = std::max<long>(NR, PANEL / K / NR * NR);
        long high = std::clamp<long>((N / (threads * 4) + NR - 1) / NR * NR, NR, most);
        for (long n = 0; n < N; n += high) strips.push_back({rows, ld, &job, n, std::min(n + high, N)});
        work += M * N * K;
        widest = std::max(widest, K);
    }
    long slab = M > 256 ? 24 * MR : M, slabs = (M + slab - 1) / slab, count = long(strips.size());
#pragma omp parallel if (work > 60000)
    {
        static thread_local Room room;
        room.open((PANEL + NR * widest) * sizeof(X));
        X* panel = room.take<X>(PANEL + NR * widest);
#pragma omp for schedule(dynamic, 1) collapse(2)
        for (long s = 0; s < count; s++)
            for (long b = 0; b < slabs; b++) {
                const Strip& strip = strips[s];
                const Job<T>& job = *strip.job;
                long m = b * slab;
                product(job.w.dtype, std::min(slab, M - m), strip.x + m * strip.ldx, strip.ldx, job.w.matrix, strip.n0, strip.n1,
                        job.y + m * job.ldy, job.ldy, panel);
            }
    }
}

}  // namespace
