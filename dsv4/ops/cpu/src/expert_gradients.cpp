// Experts in training: an expert's rows are gathered, multiplied and scattered by one thread, so that nothing waits between
// its products. What is kept for the backward pass is `hidden`, the products before the activation.
//
// Rows are numbers of type T, FP32 or BF16, and are multiplied as X: BF16 as it is where the machine can, else in FP32. Weights
// and their gradients are FP32. Pairs (token, expert) are sorted by expert: order[i] is a pair (token * k + slot), counts how
// many each expert has.
#include "swiglu.h"
#include "units.h"

namespace {

// Rows at a time, at most: of as many bytes in FP32 and in BF16.
template <class X> constexpr long BLOCK = 288 * 4 / sizeof(X);
static_assert(BLOCK<float> % ROWS == 0 && BLOCK<bf16> % ROWS == 0, "a block is whole tiles");

// Rows of each block that `count` rows are cut into: about as many in all.
template <class X> INLINE long block_of(long count) {
    long blocks = (count + BLOCK<X> - 1) / BLOCK<X>;
    return blocks > 1 ? up((count + blocks - 1) / blocks, ROWS) : count;
}

struct Task {
    long expert, first, count;
};

struct Sorted {
    const int64_t *order, *counts;
    long experts, k;

    // The rows of each expert, in blocks or all at once, those with the most first.
    template <class X> std::vector<Task> tasks(bool in_blocks) const {
        std::vector<Task> out;
        for (long e = 0, first = 0; e < experts; first += counts[e], e++) {
            long size = in_blocks ? block_of<X>(counts[e]) : counts[e];
            for (long i = 0; i < counts[e]; i += size) out.push_back({e, first + i, std::min<long>(size, counts[e] - i)});
        }
        std::stable_sort(out.begin(), out.end(), [](const Task& a, const Task& b) { return a.count > b.count; });
        return out;
    }
    // The rows of pairs, of x [n, width], in whole units; rows up to a whole tile are zeros.
    template <class T, class S> void gather(const S* x, long width, long first, long count, As<T>* to) const {
        const long stride = whole<As<T>>(width);
        for (long i = 0; i < count; i++) convert<T>(x + order[first + i] / k * width, width, to + i * stride);
        fill_up(to, width, count);
    }
    // out [n, width] = the sums of each token's rows, in the order in which it chose its experts.
    template <class T, class Out> void add(const T* rows, long n, long width, Out* out) const {
        std::vector<long> place(n * k);
        for (long i = 0; i < n * k; i++) place[order[i]] = i;
#pragma omp parallel for schedule(static)
        for (long t = 0; t < n; t++) add_rows(rows, &place[t * k], k, width, out + t * width);
    }
};

// x [n, M], weights [pairs] in the order of pairs, w13 [experts, 2 * I, M], w2 [experts, M, I] -> hidden [pairs, 2 * I],
// out [n, M]; rows [pairs, M] is room.
template <class T>
void forward(const Sorted& pairs, const T* x, long n, long M, long I, const float* weights, const float* w13, const float* w2,
             float limit, T* hidden, T* rows, float* out) {
    typedef As<T> X;
    const std::vector<Task> tasks = pairs. tasks<X>(true);
    const long wide = whole<X>(M), inner = whole<X>(I), most = std::max(wide, inner);
#pragma omp parallel
    {
        static thread_local Room room;
        room.open((BLOCK<X> * (wide + inner) + 2 * most * WIDE) * sizeof(X) + 4 * 64);
        X *mine = room.take<X>(BLOCK<X> * wide), *act = room.take<X>(BLOCK<X> * inner), *some = room.take<X>(most * WIDE);
        float* packed = room.take<float>(units<X>(most) * WIDE);
#pragma omp for schedule(dynamic, 1)
        for (size_t t = 0; t < tasks.size(); t++) {
            const auto [e, first, count] = tasks[t];
            pairs.gather<T>(x, M, first, count, mine);
            T* products = hidden + first * 2 * I;
            multiply(mine, count, M, 2 * I, false, products, 2 * I, packed, Turned<T, float>{w13 + e * 2 * I * M, M, M, some});
            for (long i = 0; i < count; i++) swiglu_row(products + i * 2 * I, weights[first + i], I, limit, act + i * inner);
            round_to<T>(act, count * inner), fill_up(act, I, count);
            multiply(act, count, I, M, false, rows + first * M, M, packed, Turned<T, float>{w2 + e * M * I, I, I, some});
        }
    }
    pairs.add(rows, n, M, out);
}

// d_out [n, M] -> d_x [n, M], d_weights [pairs], d_w13, d_w2 (zeros for an expert without rows); d_rows [pairs, M] is room.
template <class T>
void backward(const Sorted& pairs, const T* x, long n, long M, long I, const float* weights, const float* w13, const float* w2,
              float limit, const T* hidden, const float* d_out, T* d_rows, T* d_x, float* d_weights, float* d_w13, float* d_w2) {
    typedef As<T> X;
    const std::vector<Task> tasks = pairs. tasks<X>(false);  // one thread adds to an expert's weights
    for (long e = 0; e < pairs.experts; e++)
        if (!pairs.counts[e]) {
            std::fill(d_w13 + e * 2 * I * M, d_w13 + (e + 1) * 2 * I * M, 0.0f);
            std::fill(d_w2 + e * M * I, d_w2 + (e + 1) * M * I, 0.0f);
        }
    const long wide = whole<X>(M), inner = whole<X>(I), hide = 2 * I, tall = up(std::max(M, hide), ROWS);
    const long deepest = std::max({wide, hide, whole<X>(BLOCK<X>)});
#pragma omp parallel
    {
        static thread_local Room room;
        room.open((BLOCK<X> * (2 * wide + 2 * inner + hide) + 2 * tall * whole<X>(BLOCK<X>) + deepest * WIDE) * sizeof(X) + 8 * 64);
        X *mine = room.take<X>(BLOCK<X> * wide), *dy = room.take<X>(BLOCK<X> * wide), *act = room.take<X>(BLOCK<X> * inner);
        X *d_act = room.take<X>(BLOCK<X> * inner), *d_hidden = room.take<X>(BLOCK<X> * hide);
        X *turned = room.take<X>(tall * whole<X>(BLOCK<X>));
        float *some = room.take<float>(tall * units<X>(BLOCK<X>)), *packed = room.take<float>(units<X>(deepest) * WIDE);
#pragma omp for schedule(dynamic, 1)
        for (size_t t = 0; t < tasks.size(); t++) {
            const long e = tasks[t].expert;
            const float *up13 = w13 + e * 2 * I * M, *down = w2 + e * M * I;
            const long size = block_of<X>(tasks[t].count);
            for (long at = 0; at < tasks[t].count; at += size) {
                const long first = tasks[t].first + at, count = std::min(size, tasks[t].count - at);
                pairs.gather<T>(x, M, first, count, mine), pairs.gather<T>(d_out, M, first, count, dy);
                multiply(dy, count, M, I, false, d_act, I, packed, Plain<T, float>{down, I, M});
                round_to<T>(d_act, count * I);
                for (long i = 0; i < count; i++)
                    d_weights[first + i] = swiglu_row_backward(hidden + (first + i) * hide, weights[first + i], d_act + i * I, I,
                                                               limit, act + i * inner, d_hidden + i * hide);
                round_to<T>(act, count * inner), round_to<T>(d_hidden, count * hide);
                fill_up(act, I, count), fill_up(d_hidden, hide, count);
                // sums over rows: what lies row by row is turned
                turn_rows<T>(dy, wide, count, M, some, turned);
                multiply(turned, M, count, I, at > 0, d_w2 + e * M * I, I, packed, Plain<T, X>{act, inner, count});
                turn_rows<T>(d_hidden, hide, count, hide, some, turned);
                multiply(turned, hide, count, M, at > 0, d_w13 + e * 2 * I * M, M, packed, Plain<T, X>{mine, wide, count});
                multiply(d_hidden, count, hide, M, false, d_rows + first * M, M, packed, Plain<T, float>{up13, M, hide});
            }
        }
    }
    pairs.add(d_rows, n, M, d_x);
}

}  // namespace

EXPORT(experts_forward)
(const void* x, int is_bf16, long n, long M, long I, const int64_t* order, const int64_t* counts, long experts, long k,
 const float* weights, const float* w13, const float* w2, float limit, void* hidden, void* rows, float* out) {
    const Sorted pairs{order, counts, experts, k};
    auto run = [&](auto* x) {
        typedef std::remove_const_t<std::remove_pointer_t<decltype(x)>> T;
        forward(pairs, x, n, M, I, weights, w13, w2, limit, static_cast<T*>(hidden), static_cast<T*>(rows), out);
    };
    if (is_bf16) run(static_cast<const bf16*>(x));
    else run(static_cast<const float*>(x));
}

EXPORT(experts_backward)
(const void* x, int is_bf16, long n, long M, long I, const int64_t* order, const int64_t* counts, long experts, long k,
 const float* weights, const float* w13, const float* w2, float limit, const void* hidden, const float* d_out, void* d_rows,
 void* d_x, float* d_weights, float* d_w13, float* d_w2) {
    const Sorted pairs{order, counts, experts, k};
    auto run = [&](auto* x) {
        typedef std::remove_const_t<std::remove_pointer_t<decltype(x)>> T;
        backward(pairs, x, n, M, I, weights, w13, w2, limit, static_cast<const T*>(hidden), d_out, static_cast<T*>(d_rows),
                 static_cast<T*>(d_x), d_weights, d_w13, d_w2);
    };
    if (is_bf16) run(static_cast<const bf16*>(x));
    else run(static_cast<const float*>(x));
}
