// What an expert does with a row between its products, the clamped SwiGLU silu(min(gate, limit)) * clamp(up, -limit, limit) *
// weight with its gradients; and how a token's experts are added.
#pragma once

#include "norm.h"

namespace {

INLINE vf bounded(vf x, float limit) { return x > limit ? splat(limit) : (x < -limit ? splat(-limit) : x); }  // a NaN stays

// hidden [2 * I] (gate, then up) -> act [I]
template <class T, class A> INLINE void swiglu_row(const T* hidden, float weight, long I, float limit, A* act) {
    const T *gate = hidden, *up = hidden + I;
    for (long c = 0; c < I; c += LANES) {
        vf g = load_up_to(gate + c, I - c);
        g = g > limit ? splat(limit) : g;
        store_up_to(act + c, g * sigmoid(g) * bounded(load_up_to(up + c, I - c), limit) * splat(weight), I - c);
    }
}

// d_act [I], the gradient of what was given -> act once more and d_hidden [2 * I]; returned: the weight's. A clamped number
// carries no gradient; on the bound itself it does, as in torch.clamp.
template <class T, class A>
INLINE float swiglu_row_backward(const T* hidden, float weight, const A* d_act, long I, float limit, A* act, A* d_hidden) {
    const T *gate = hidden, *up = hidden + I;
    vf scale = splat(weight), total = {};
    for (long c = 0; c < I; c += LANES) {
        long left = I - c;
        vf raw = load_up_to(gate + c, left), y = load_up_to(up + c, left), d = load_up_to(d_act + c, left);
        vf g = raw > limit ? splat(limit) : raw, u = bounded(y, limit), s = sigmoid(g), silu = g * s, a = silu * u;
        total += d * a;
        store_up_to(act + c, a * scale, left);
        d = d * scale;
        vf d_gate = d * u * (s + silu * (1.0f - s)), d_up = d * silu;
        store_up_to(d_hidden + c, raw > limit ? vf{} : d_gate, left);
        store_up_to(d_hidden + I + c, (y > limit) | (y < -limit) ? vf{} : d_up, left);
    }
    return sum(total);
}

// out [width] = the sum of `count` rows, in the order of `places`
template <class T, class Out> INLINE void add_rows(const T* rows, const long* places, long count, long width, Out* out) {
    for (long c = 0; c < width; c += LANES) {
        vf total = load_up_to(rows + places[0] * width + c, width - c);
        for (long i = 1; i < count; i++) total += load_up_to(rows + places[i] * width + c, width - c);
        store_up_to(out + c, total, width - c);
    }
}

}  // namespace
