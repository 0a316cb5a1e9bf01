// Experts in training, FP32: an expert's rows are gathered, multiplied and scattered by one thread, so that nothing waits
// between its products. What is kept for the backward pass is `hidden`, the products before the activation.
//
// Pairs (token, expert) are sorted by expert: order[i] is a pair (token * k + slot), counts how many each expert has.
#include "strips.h"
#include "swiglu.h"

namespace {

constexpr long BLOCK = 288;  // rows at a time, at most; a multiple of all ROWS
static_assert(BLOCK % ROWS == 0, "a block is whole tiles");

// Rows of each block that `count` rows are cut into: about as many in all.
INLINE long block_of(long count) {
    long blocks = (count + BLOCK - 1) / BLOCK;
    return blocks > 1 ? up((count + blocks - 1) / blocks, ROWS) : count;
}

struct Task {
    long expert, first, count;
};

struct Sorted {
    const int64_t *order, *counts;
    long experts, k;

    // The rows of each expert, in blocks or all at once, those with the most first.
    std::vector<Task> tasks(bool in_blocks) const {
        std::vector<Task> out;
        for (long e = 0, first = 0; e < experts; first += counts[e], e++) {
            long size = in_blocks ? block_of(counts[e]) : counts[e];
            for (long i = 0; i < counts[e]; i += size) out.push_back({e, first + i, std::min<long>(size, counts[e] - i)});
        }
        std::stable_sort(out.begin(), out.end(), [](const Task& a, const Task& b) { return a.count > b.count; });
        return out;
    }
    // The rows of pairs, of x [n, width]; rows up to a whole tile are zeros.
    void gather(const float* x, long width, long first, long count, float* to) const {
        for (long i = 0; i < count; i++) std::memcpy(to + i * width, x + order[first + i] / k * width, width * sizeof(float));
        std::fill(to + count * width, to + up(count, ROWS) * width, 0.0f);
    }
    // out [n, width] = the sums of each token's rows, in the order in which it chose its experts.
    void add(const float* rows, long n, long width, float* out) const {
        std::vector<long> place(n * k);
        for (long i = 0; i < n * k; i++) place[order[i]] = i;
#pragma omp parallel for schedule(static)
        for (long t = 0; t < n; t++) add_rows(rows, &place[t * k], k, width, out + t * width);
    }
};

// A product by strips, into out [rows, columns]: added to it where `add`. pack(j, columns, to): the strip from column j on of
// what x [rows, K] is multiplied with, [K, WIDE].
template <class Pack>
void multiply(const float* x, long rows, long K, long columns, bool add, float* out, float* packed, const Pack& pack) {
    for (long j = 0; j < columns; j += WIDE) {
        long there = std::min<long>(WIDE, columns - j);
        pack(j, there, packed);
        strip({x, out + j, out + j, K, columns, add ? 1.0f : 0.0f, 1, false, rows, there}, rows, packed, K);
    }
}

// Strips of w [K, columns], and of the turned w [columns, K].
struct Plain {
    const float* w;
    long ld, K;
    void operator()(long j, long there, float* to) const {
        for (long i = 0; i < K; i++) {
            std::memcpy(to + i * WIDE, w + i * ld + j, there * sizeof(float));
            std::fill(to + i * WIDE + there, to + (i + 1) * WIDE, 0.0f);
        }
    }
};
struct Turned {
    const float* w;
    long K;
    void operator()(long j, long there, float* to) const {
        if (there < WIDE) std::fill(to, to + K * WIDE, 0.0f);
        turn(w + j * K, K, there, K, to, WIDE);
    }
};

}  // namespace

// x [n, M], weights [pairs] in the order of pairs, w13 [experts, 2 * I, M], w2 [experts, M, I] -> hidden [pairs, 2 * I],
// out [n, M]; rows [pairs, M] is room.
EXPORT(experts_forward)
(const float* x, long n, long M, long I, const int64_t* order, const int64_t* counts, long experts, long k, const float* weights,
 const float* w13, const float* w2, float limit, float* hidden, float* rows, float* out) {
    const Sorted pairs{order, counts, experts, k};
    const std::vector<Task> tasks = pairs.tasks(true);
#pragma omp parallel
    {
        static thread_local Room room;
        room.open((BLOCK * (M + I) + std::max(M, I) * WIDE) * sizeof(float) + 3 * 64);
        float *mine = room.take<float>(BLOCK * M), *act = room.take<float>(BLOCK * I);
        float* packed = room.take<float>(std::max(M, I) * WIDE);
#pragma omp for schedule(dynamic, 1)
        for (size_t t = 0; t < tasks.size(); t++) {
            const auto [e, first, count] = tasks[t];
            pairs.gather(x, M, first, count, mine);
            float* products = hidden + first * 2 * I;
            multiply(mine, count, M, 2 * I, false, products, packed, Turned{w13 + e * 2 * I * M, M});
            for (long i = 0; i < count; i++) swiglu_row(products + i * 2 * I, weights[first + i], I, limit, act + i * I);
            std::fill(act + count * I, act + up(count, ROWS) * I, 0.0f);
            multiply(act, count, I, M, false, rows + first * M, packed, Turned{w2 + e * M * I, I});
        }
    }
    pairs.add(rows, n, M, out);
}

// d_out [n, M] -> d_x [n, M], d_weights [pairs], d_w13, d_w2 (zeros for an expert without rows); d_rows [pairs, M] is room.
EXPORT(experts_backward)
(const float* x, long n, long M, long I, const int64_t* order, const int64_t* counts, long experts, long k, const float* weights,
 const float* w13, const float* w2, float limit, const float* hidden, const float* d_out, float* d_rows, float* d_x, float* d_weights,
 float* d_w13, float* d_w2) {
    const Sorted pairs{order, counts, experts, k};
    const std::vector<Task> tasks = pairs.tasks(false);  // one thread adds to an expert's weights
    for (long e = 0; e < experts; e++)
        if (!counts[e]) {
            std::fill(d_w13 + e * 2 * I * M, d_w13 + (e + 1) * 2 * I * M, 0.0f);
            std::fill(d_w2 + e * M * I, d_w2 + (e + 1) * M * I, 0.0f);
        }
#pragma omp parallel
    {
        static thread_local Room room;
        const long wide = std::max({M, 2 * I, BLOCK}), tall = up(std::max(M, 2 * I), ROWS);
        room.open((BLOCK * (2 * M + 4 * I) + tall * BLOCK + wide * WIDE) * sizeof(float) + 7 * 64);
        float *mine = room.take<float>(BLOCK * M), *dy = room.take<float>(BLOCK * M), *act = room.take<float>(BLOCK * I);
        float *d_act = room.take<float>(BLOCK * I), *d_hidden = room.take<float>(BLOCK * 2 * I);
        float *turned = room.take<float>(tall * BLOCK), *packed = room.take<float>(wide * WIDE);
#pragma omp for schedule(dynamic, 1)
        for (size_t t = 0; t < tasks.size(); t++) {
            const long e = tasks[t].expert;
            const float *up13 = w13 + e * 2 * I * M, *down = w2 + e * M * I;
            const long size = block_of(tasks[t].count);
            for (long at = 0; at < tasks[t].count; at += size) {
                const long first = tasks[t].first + at, count = std::min(size, tasks[t].count - at);
                pairs.gather(x, M, first, count, mine), pairs.gather(d_out, M, first, count, dy);
                multiply(dy, count, M, I, false, d_act, packed, Plain{down, I, M});
                for (long i = 0; i < count; i++)
                    d_weights[first + i] = swiglu_row_backward(hidden + (first + i) * 2 * I, weights[first + i], d_act + i * I, I,
                                                               limit, act + i * I, d_hidden + i * 2 * I);
                std::fill(d_hidden + count * 2 * I, d_hidden + up(count, ROWS) * 2 * I, 0.0f);
                // sums over rows: what lies row by row is turned
                turn(dy, M, count, M, turned, count);
                multiply(turned, M, count, I, at > 0, d_w2 + e * M * I, packed, Plain{act, I, count});
                turn(d_hidden, 2 * I, count, 2 * I, turned, count);
                multiply(turned, 2 * I, count, M, at > 0, d_w13 + e * 2 * I * M, packed, Plain{mine, M, count});
                multiply(d_hidden, count, 2 * I, M, false, d_rows + first * M, packed, Plain{up13, M, 2 * I});
            }
        }
    }
    pairs.add(d_rows, n, M, d_x);
}
