// How tokens are routed: scores of all experts in FP32, the best k of them or given ones, and their weights.
#include <climits>

#include "calls.h"
#include "matmul.h"
#include "room.h"

namespace {

constexpr long SLAB = 256;  // tokens at a time, which bounds what is widened

// sqrt(softplus(logit)) in place, with the floor that the reference has
INLINE void to_scores(float* logits, long count) {
    for (long i = 0; i < count; i += LANES) {
        bool whole = i + LANES <= count;
        vf x = whole ? load(logits + i) : load_some(logits + i, int(count - i));
        vf y = x > 20.0f ? x : log1p(exp(x));
        vf score = sqrt(y < 0x1p-126f ? splat(0x1p-126f) : y);
        if (whole) store(logits + i, score);
        else store_some(logits + i, score, int(count - i));
    }
}

// Numbers that are ordered as scores are, -0.0 like 0.0, and NaN above all; none is INT_MIN.
INLINE vi order(vf score) {
    vi bits = (vi)as_bits(score + 0.0f), ordered = bits ^ ((bits >> 31) & 0x7fffffff);
    return score != score ? vi{} + INT_MAX : ordered;
}

// The k best of `count` experts by score + bias, in the order of choice; `keys` has room for whole vectors.
void choose(const float* scores, const float* bias, long count, long k, int32_t* keys, int64_t* chosen) {
    long vectors = (count + LANES - 1) / LANES;
    for (long i = 0; i < vectors * LANES; i += LANES) {
        vf biased;
        if (i + LANES <= count) biased = load(scores + i) + load(bias + i);
        else biased = load_some(scores + i, int(count - i)) + load_some(bias + i, int(count - i));
        vi key = order(biased);
        std::memcpy(keys + i, &key, sizeof key);
    }
    std::fill(keys + count, keys + vectors * LANES, INT_MIN);
    for (long slot = 0; slot < k; slot++) {
        vi best = load_as<vi>(keys), at = {};  // of each lane: its largest key, and the first vector that has it
        for (int v = 1; v < vectors; v++) {
            vi key = load_as<vi>(keys + v * LANES), better = key > best;
            best = better ? key : best;
            at = better ? vi{} + v : at;
        }
        int32_t top = best[0];
        for (int i = 1; i < LANES; i++) top = std::max(top, best[i]);
        long expert = LONG_MAX;
        for (int i = 0; i < LANES; i++)
            if (best[i] == top) expert = std::min<long>(expert, at[i] * LANES + i);
        chosen[slot] = expert;
        keys[expert] = INT_MIN;
    }
}

// The chosen experts' scores, normalised to sum to `scale`
INLINE void weigh(const float* scores, long count, const int64_t* chosen, long k, float scale, float* weights) {
    float total = 0;
    for (long i = 0; i < k; i++) {
        weights[i] = chosen[i] >= 0 && chosen[i] < count ? scores[chosen[i]] : NAN;  // no such expert: nothing is read
        total += weights[i];
    }
    for (long i = 0; i < k; i++) weights[i] = weights[i] / total * scale;
}

// Tokens x [n, M] with weights [X, M] -> scores [n, X], chosen and weights [n, k]
template <int D, class T>
void gate(
    const T* x, long n, const Matrix& w, long X, const float* bias, const int64_t* given, long k, float scale,
    float* scores, int64_t* chosen, float* weights) {
    long M = w.columns, threads = omp_get_max_threads();
    constexpr bool plain = std::is_same<T, float>::value;
    std::vector<float> room(plain ? 0 : std::min(n, SLAB) * M);
    long strip = std::clamp<long>((X / (threads * 4) + NR - 1) / NR * NR, NR, std::max<long>(NR, PANEL / M / NR * NR));
    long strips = (X + strip - 1) / strip;
#pragma omp parallel if (n * X * M > 30000)
    {
        static thread_local Room own;
        own.open((PANEL + NR * M) * sizeof(float));
        float* panel = own.take<float>(PANEL + NR * M);
        std::vector<int32_t> keys(X + LANES);
        for (long t = 0; t < n; t += SLAB) {
            long count = std::min(SLAB, n - t);
            const float* rows;
            if constexpr (plain) rows = x + t * M;
            else {
                rows = room.data();
#pragma omp for schedule(static)
                for (long m = 0; m < count; m++) {
                    long i = 0;
                    for (; i + LANES <= M; i += LANES) store(&room[m * M + i], load(x + (t + m) * M + i));
                    for (; i < M; i++) room[m * M + i] = widen(x[(t + m) * M + i]);
                }
            }
#pragma omp for schedule(dynamic, 1)
            for (long s = 0; s < strips; s++)
                product(D, count, rows, M, w, s * strip, std::min(X, (s + 1) * strip), scores + t * X, X, panel);
#pragma omp for schedule(static)
            for (long m = t; m < t + count; m++) {
                to_scores(scores + m * X, X);
                if (!given) choose(scores + m * X, bias, X, k, keys.data(), chosen + m * k);
                weigh(scores + m * X, X, (given ? given : chosen) + m * k, k, scale, weights + m * k);
            }
        }
    }
}

}  // namespace

// x [n, M] FP32 or BF16; weights [X, M] FP32 or BF16, `stride` numbers from row to row. Experts are given, or chosen by
// their biased scores: one of `bias` and `given` is null, and `chosen` is written where `given` is null.
EXPORT(gate)
(const void* x, int is_bf16, long n, long M, const void* weight, int weight_is_bf16, long stride, long X,
 const float* bias, const int64_t* given, long k, float scale, float* scores, int64_t* chosen, float* weights) {
    Matrix w{weight, nullptr, M, stride};
    auto run = [&](const auto* rows) {
        if (weight_is_bf16) gate<BF16>(rows, n, w, X, bias, given, k, scale, scores, chosen, weights);
        else gate<F32>(rows, n, w, X, bias, given, k, scale, scores, chosen, weights);
    };
    if (is_bf16) run(static_cast<const bf16*>(x));
    else run(static_cast<const float*>(x));
}
