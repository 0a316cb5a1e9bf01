// From logits to the next token's loss and its gradient, a row at a time.
#include "norm.h"

namespace {

// logits [V] -> their loss, and over them or elsewhere the gradient d [V]: softmax, less 1 at the target.
template <class T> float row_loss(const float* logits, long V, long target, T* d) {
    vf most = splat(-INFINITY), total = {};
    auto each = [&](const auto& f) __attribute__((always_inline)) {
        for (long c = 0; c + LANES <= V; c += LANES) f(c, load(logits + c), LANES);
        if (int left = int(V % LANES)) {
            float part[LANES];
            std::fill(part, part + LANES, -INFINITY);
            std::memcpy(part, logits + V - left, left * sizeof(float));
            f(V - left, load(part), left);
        }
    };
    each([&](long, vf x, int) { most = max(x, most); });
    float part[LANES], top = -INFINITY;
    store(part, most);
    for (float p : part) top = std::max(top, p);
    each([&](long, vf x, int) { total += exp(x - top); });
    const float lse = top + std::log(sum(total)), loss = lse - logits[target];
    if (d) {
        each([&](long c, vf x, int count) { store_up_to(d + c, exp(x - lse), count); });
        store(d + target, widen(d[target]) - 1.0f);
    }
    return loss;
}

template <class T> void losses(const float* logits, const int64_t* targets, long n, long V, long ignore, T* d, float* out) {
#pragma omp parallel for schedule(static) if (n * V > 20000)
    for (long i = 0; i < n; i++) {
        T* row = d ? d + i * V : nullptr;
        const bool there = targets[i] != ignore;
        out[i] = there ? row_loss(logits + i * V, V, targets[i], row) : 0;
        if (row && !there) std::fill(row, row + V, T(0));
    }
}

}  // namespace

// logits FP32 [n, V], targets [n] -> losses [n], 0 where the target is `ignore`; d [n, V], of its kind, may be the logits' place,
// or none: then no gradient is wanted.
EXPORT(losses)
(const float* logits, const int64_t* targets, long n, long V, long ignore, void* d, int is_bf16, float* out) {
    if (is_bf16) losses(logits, targets, n, V, ignore, static_cast<bf16*>(d), out);
    else losses(logits, targets, n, V, ignore, static_cast<float*>(d), out);
}
