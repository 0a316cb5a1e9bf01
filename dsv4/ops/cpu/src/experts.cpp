// The sum over a token's experts of w2 (weight * clamped SwiGLU(w1 x, w3 x)); the shared expert is one of a kind.
//
// (token, expert) pairs are sorted by expert, so that each weight is read once for all tokens that use it. A pair's
// numbers do not depend on the other pairs, and a token's experts are added in the order in which it chose them.
#include "calls.h"
#include "matmul.h"
#include "room.h"
#include "swiglu.h"

namespace {

// Where an expert's rows begin: gate and up may lie in one matrix.
struct Weights {
    Matrix gate, up, down;
    long step, offset, down_step;  // rows from expert to expert (0: all share one), and from gate to up
    long inner, width;             // I, M
};

struct Group {
    long expert, first, count;
};

// Pairs sorted by expert: order[i] is a pair (token * k + slot).
std::vector<Group> sorted(const int64_t* chosen, long pairs, long experts, std::vector<long>& order) {
    std::vector<long> start(experts + 1);
    for (long i = 0; i < pairs; i++) start[chosen[i] + 1]++;
    std::vector<Group> groups;
    for (long e = 0; e < experts; e++) {
        if (start[e + 1]) groups.push_back({e, start[e], start[e + 1]});
        start[e + 1] += start[e];
    }
    order.resize(pairs);
    for (long i = 0; i < pairs; i++) order[start[chosen[i]]++] = i;
    return groups;
}

struct Task {
    long group, n0, n1, first, count;
};

// Each group's outputs in strips and its rows in slabs, enough of them for all threads.
std::vector<Task> tasks(const std::vector<Group>& groups, long outputs, long K, long threads) {
    std::vector<Task> out;
    long wanted = (4 * threads + long(groups.size()) - 1) / long(groups.size());
    long strip = std::clamp<long>((outputs / wanted + NR - 1) / NR * NR, NR, std::max<long>(NR, PANEL / K / NR * NR));
    for (size_t g = 0; g < groups.size(); g++)
        for (long m = 0; m < groups[g].count; m += 24 * MR)
            for (long n = 0; n < outputs; n += strip)
                out.push_back({long(g), n, std::min(n + strip, outputs), m, std::min<long>(24 * MR, groups[g].count - m)});
    return out;
}

template <class T>
void run(int dtype, const T* x, long n, const int64_t* chosen, const float* weights, long k, long experts, const Weights& w, float limit,
         float* out) {
    typedef typename Multiplied<T>::type X;
    long M = w.width, I = w.inner, pairs = n * k, threads = omp_get_max_threads();
    if (!n) return;
    std::vector<long> order;
    std::vector<Group> groups = sorted(chosen, pairs, experts, order);
    std::vector<Task> first = tasks(groups, I, M, threads), second = tasks(groups, M, I, threads);
    std::vector<X> widened;
    const X* wide = as_multiplied<X>(x, n * M, widened);
    static thread_local Room room;
    room.open(pairs * (M + I) * sizeof(X) + pairs * (2 * I + M) * sizeof(T) + 4 * 64);
    X *rows = room.take<X>(pairs * M), *act = room.take<X>(pairs * I);
    T *hidden = room.take<T>(pairs * 2 * I), *parts = room.take<T>(pairs * M);  // rounded to the dtype of x
#pragma omp parallel if (pairs * I * M > 60000)
    {
        static thread_local Room own;
        own.open((PANEL + NR * std::max(M, I)) * sizeof(X) + I * sizeof(T) + 64);
        X* panel = own.take<X>(PANEL + NR * std::max(M, I));
        [[maybe_unused]] T* rounded = own.take<T>(I);
#pragma omp for
        for (long i = 0; i < pairs; i++) std::memcpy(&rows[i * M], wide + order[i] / k * M, M * sizeof(X));
#pragma omp for schedule(dynamic, 1)
        for (size_t t = 0; t < first.size(); t++) {
            const Task& job = first[t];
            const Group& g = groups[job.group];
            long at = g.first + job.first, gate = g.expert * w.step, up = gate + w.offset;
            T* to = &hidden[at * 2 * I];
            product(dtype, job.count, &rows[at * M], M, w.gate, gate + job.n0, gate + job.n1, to - gate, 2 * I, panel);
            product(dtype, job.count, &rows[at * M], M, w.up, up + job.n0, up + job.n1, to + I - up, 2 * I, panel);
        }
#pragma omp for
        for (long i = 0; i < pairs; i++) {
            float weight = weights ? weights[order[i]] : 1.0f;
            if constexpr (std::is_same<X, T>::value) swiglu_row(&hidden[i * 2 * I], weight, I, limit, act + i * I);
            else {  // rounded to the dtype of x, and multiplied in FP32
                swiglu_row(&hidden[i * 2 * I], weight, I, limit, rounded);
                for (long c = 0; c < I; c += LANES) store_up_to(act + i * I + c, load_up_to(rounded + c, I - c), I - c);
            }
        }
#pragma omp for schedule(dynamic, 1)
        for (size_t t = 0; t < second.size(); t++) {
            const Task& job = second[t];
            const Group& g = groups[job.group];
            long at = g.first + job.first, row = g.expert * w.down_step;
            product(dtype, job.count, &act[at * I], I, w.down, row + job.n0, row + job.n1, &parts[at * M] - row, M, panel);
        }
#pragma omp single
        {
            std::vector<long> place(pairs);
            for (long i = 0; i < pairs; i++) place[order[i]] = i;
            order.swap(place);
        }
#pragma omp for
        for (long t = 0; t < n; t++)
            add_rows(parts, &order[t * k], k, M, out + t * M);
    }
}

}  // namespace

// x [n, M] -> out fp32 [n, M]; chosen [n, k]; weights fp32 [n, k], or none: then they are 1. Rows of experts: see Weights.
EXPORT(experts)
(const void* x, int is_bf16, long n, long M, long I, const int64_t* chosen, const float* weights, long k, long experts,
 const void* gate, const void* gate_scales, const void* up, const void* up_scales, const void* down, const void* down_scales,
 int dtype, long step, long offset, long down_step, float limit, float* out) {
    auto matrix = [](const void* data, const void* scales, long columns) {
        return Matrix{data, static_cast<const uint8_t*>(scales), columns, columns};
    };
    Weights w{matrix(gate, gate_scales, M), matrix(up, up_scales, M), matrix(down, down_scales, I), step, offset, down_step, I, M};
    constexpr long BLOCK = 1024;  // tokens at a time, so that what stands between is bounded
    for (long t = 0; t < n; t += BLOCK) {
        long count = std::min(BLOCK, n - t);
        const int64_t* choice = chosen + t * k;
        const float* weight = weights ? weights + t * k : nullptr;
        if (is_bf16) run(dtype, static_cast<const bf16*>(x) + t * M, count, choice, weight, k, experts, w, limit, out + t * M);
        else run(dtype, static_cast<const float*>(x) + t * M, count, choice, weight, k, experts, w, limit, out + t * M);
    }
}
