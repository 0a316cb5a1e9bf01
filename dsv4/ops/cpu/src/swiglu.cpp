// The clamped SwiGLU of many rows, for experts that torch multiplies.
#include "swiglu.h"

namespace {

template <class T> void forward(const T* hidden, const float* weights, long n, long I, float limit, T* act) {
#pragma omp parallel for schedule(static) if (n * I > 20000)
    for (long i = 0; i < n; i++) swiglu_row(hidden + i * 2 * I, weights ? weights[i] : 1.0f, I, limit, act + i * I);
}

template <class T>
void backward(const T* hidden, const float* weights, const T* d_act, long n, long I, float limit, T* act, T* d_hidden,
              float* d_weights) {
#pragma omp parallel for schedule(static) if (n * I > 20000)
    for (long i = 0; i < n; i++) {
        float found = swiglu_row_backward(hidden + i * 2 * I, weights ? weights[i] : 1.0f, d_act + i * I, I, limit, act + i * I,
                                          d_hidden + i * 2 * I);
        if (d_weights) d_weights[i] = found;
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
