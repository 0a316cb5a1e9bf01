// The clamped SwiGLU of experts, silu(min(gate, limit)) * clamp(up, -limit, limit) * weight, and its gradients, row by row.
#include "norm.h"

namespace {

INLINE vf bounded(vf x, float limit) { return x > limit ? splat(limit) : (x < -limit ? splat(-limit) : x); }  // a NaN stays

template <class T> void forward(const T* hidden, const float* weights, long n, long I, float limit, T* act) {
#pragma omp parallel for schedule(static) if (n * I > 20000)
    for (long i = 0; i < n; i++) {
        const T *gate = hidden + i * 2 * I, *up = gate + I;
        vf weight = splat(weights ? weights[i] : 1.0f);
        for (long c = 0; c < I; c += LANES) {
            vf g = load_up_to(gate + c, I - c);
            g = g > limit ? splat(limit) : g;
            store_up_to(act + i * I + c, g * sigmoid(g) * bounded(load_up_to(up + c, I - c), limit) * weight, I - c);
        }
    }
}

// A clamped number carries no gradient; on the bound itself it does, as in torch.clamp.
template <class T>
void backward(const T* hidden, const float* weights, const T* d_act, long n, long I, float limit, T* act, T* d_hidden,
              float* d_weights) {
#pragma omp parallel for schedule(static) if (n * I > 20000)
    for (long i = 0; i < n; i++) {
        const T *gate = hidden + i * 2 * I, *up = gate + I;
        T* to = d_hidden + i * 2 * I;
        vf weight = splat(weights ? weights[i] : 1.0f), total = {};
        for (long c = 0; c < I; c += LANES) {
            long left = I - c;
            vf raw = load_up_to(gate + c, left), y = load_up_to(up + c, left), d = load_up_to(d_act + i * I + c, left);
            vf g = raw > limit ? splat(limit) : raw, u = bounded(y, limit), s = sigmoid(g), silu = g * s, a = silu * u;
            total += d * a;
            store_up_to(act + i * I + c, a * weight, left);
            d = d * weight;
            vf d_gate = d * u * (s + silu * (1.0f - s)), d_up = d * silu;
            store_up_to(to + c, raw > limit ? vf{} : d_gate, left);
            store_up_to(to + I + c, (y > limit) | (y < -limit) ? vf{} : d_up, left);
        }
        if (d_weights) d_weights[i] = sum(total);
    }
}

}  // namespace

// hidden [n, 2 * I] (gate, then up), FP32 or BF16 -> act [n, I] of its kind; weights FP32 [n], or none: then they are 1.
EXPORT(swiglu)(const void* hidden, int is_bf16, const float* weights, long n, long I, float limit, void* act) {
    if (is_bf16) forward(static_cast<const bf16*>(hidden), weights, n, I, limit, static_cast<bf16*>(act));
    else forward(static_cast<const float*>(hidden), weights, n, I, limit, static_cast<float*>(act));
}

// d_act [n, I], the gradient of what was given -> act once more, d_hidden [n, 2 * I], and, where wanted, d_weights FP32 [n]
EXPORT(swiglu_backward)
(const void* hidden, int is_bf16, const float* weights, const void* d_act, long n, long I, float limit, void* act, void* d_hidden,
 float* d_weights) {
    if (is_bf16)
        backward(static_cast<const bf16*>(hidden), weights, static_cast<const bf16*>(d_act), n, I, limit, static_cast<bf16*>(act),
                 static_cast<bf16*>(d_hidden), d_weights);
    else
        backward(static_cast<const float*>(hidden), weights, static_cast<const float*>(d_act), n, I, limit,
                 static_cast<float*>(act), static_cast<float*>(d_hidden), d_weights);
}
