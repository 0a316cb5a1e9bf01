// What stands before and after attention: projections, norms and rotations of a token, one call each.
#include "calls.h"
#include "linear.h"
#include "norm.h"

namespace {

template <class T>
void project_in(const T* x, long n, const Weight& wq_a, const float* q_gain, const Weight& wq_b, const Weight& wkv,
                const float* kv_gain, long H, float eps, const float* turn, long pairs, T* qr, T* q, T* kv, T* row) {
    long M = wq_a.matrix.columns, L = wq_a.rows, D = wkv.rows, plain = D - 2 * pairs;
    linear<T>(n, {{x, M, wq_a, qr, L}, {x, M, wkv, kv, D}});
#pragma omp parallel for if (n > 16)
    for (long t = 0; t < n; t++) {
        rms_norm(qr + t * L, L, q_gain, eps);
        rms_norm(kv + t * D, D, kv_gain, eps);
        std::memcpy(row + t * D, kv + t * D, plain * sizeof(T));
        turn_pairs(kv + t * D + plain, row + t * D + plain, turn + t * 2 * pairs, pairs, 1.0f);
    }
    linear<T>(n, {{qr, L, wq_b, q, H * D}});
#pragma omp parallel for if (n > 4)
    for (long i = 0; i < n * H; i++) {
        rms_norm(q + i * D, D, static_cast<const float*>(nullptr), eps);
        turn_pairs(q + i * D + plain, q + i * D + plain, turn + i / H * 2 * pairs, pairs, 1.0f);
    }
}

template <class T>
void project_out(T* o, long n, long H, long D, const float* turn, long pairs, const Weight& wo_a, long G, const Weight& wo_b,
                 T* low, T* y) {
    long width = H * D / G, rank = wo_a.rows / G, plain = D - 2 * pairs;
#pragma omp parallel for if (n > 4)
    for (long i = 0; i < n * H; i++)
        turn_pairs(o + i * D + plain, o + i * D + plain, turn + i / H * 2 * pairs, pairs, -1.0f);
    std::vector<Job<T>> groups;
    for (long g = 0; g < G; g++)
        groups.push_back({o + g * width, H * D, {wo_a.matrix.from(wo_a.dtype, g * rank), wo_a.dtype, rank}, low + g * rank, G * rank});
    linear<T>(n, groups);
    linear<T>(n, {{low, G * rank, wo_b, y, wo_b.rows}});
}

}  // namespace

#define TAKE(name) \
    Weight{{name##_data, static_cast<const uint8_t*>(name##_scales), name##_columns, name##_columns}, name##_dtype, name##_rows}

// x [n, M] -> qr [n, L] normed, q [n, H, D] normed and rotated, kv [n, D] normed, row [n, D] = kv rotated
EXPORT(project_in)
(const void* x, int is_bf16, long n, WEIGHT(wq_a), const float* q_gain, WEIGHT(wq_b), WEIGHT(wkv), const float* kv_gain, long H,
 float eps, const float* turn, long pairs, void* qr, void* q, void* kv, void* row) {
    if (is_bf16)
        project_in(static_cast<const bf16*>(x), n, TAKE(wq_a), q_gain, TAKE(wq_b), TAKE(wkv), kv_gain, H, eps, turn, pairs,
                   static_cast<bf16*>(qr), static_cast<bf16*>(q), static_cast<bf16*>(kv), static_cast<bf16*>(row));
    else
        project_in(static_cast<const float*>(x), n, TAKE(wq_a), q_gain, TAKE(wq_b), TAKE(wkv), kv_gain, H, eps, turn, pairs,
                   static_cast<float*>(qr), static_cast<float*>(q), static_cast<float*>(kv), static_cast<float*>(row));
}

// o [n, H, D], rotated back in place -> low [n, G * rank] -> y [n, M]
EXPORT(project_out)
(void* o, int is_bf16, long n, long H, long D, const float* turn, long pairs, WEIGHT(wo_a), long G, WEIGHT(wo_b), void* low, void* y) {
    if (is_bf16)
        project_out(static_cast<bf16*>(o), n, H, D, turn, pairs, TAKE(wo_a), G, TAKE(wo_b), static_cast<bf16*>(low),
                    static_cast<bf16*>(y));
    else
        project_out(static_cast<float*>(o), n, H, D, turn, pairs, TAKE(wo_a), G, TAKE(wo_b), static_cast<float*>(low),
                    static_cast<float*>(y));
}

// Rows of a compressor, [n, 2, C] fp32: values wkv x, and scores wgate x + the positional bias ape[position % r].
EXPORT(compressor_rows)
(const void* x, int is_bf16, long n, long M, const float* wkv, const float* wgate, long C, const float* ape, long r,
 const int64_t* positions, float* out) {
    std::vector<float> room;
    const float* wide = is_bf16 ? as_multiplied<float>(static_cast<const bf16*>(x), n * M, room) : static_cast<const float*>(x);
    linear<float>(n, {{wide, M, {{wkv, nullptr, M, M}, F32, C}, out, 2 * C}, {wide, M, {{wgate, nullptr, M, M}, F32, C}, out + C, 2 * C}});
    for (long t = 0; t < n; t++) {
        float* scores = out + t * 2 * C + C;
        const float* bias = ape + positions[t] % r * C;
        for (long c = 0; c < C; c++) scores[c] += bias[c];
    }
}
