// The gradient of Sinkhorn's steps, which are done again. Each is y = x / (sum x + eps), so that dx = (dy - sum(dy y)) /
// (sum x + eps), the sums over rows or columns in turn: bounded, with nothing to overflow.
#pragma once

#include "maps.h"

namespace {

struct Step {  // what one made of a 4 x 4 matrix, and one over what it divided by
    Four after, inverse;
};

// Vectors of room for the steps of B matrices of 4 x 4, or of one of N x N.
inline long sinkhorn_room(int N, int iters, int B) {
    return long(2 * iters - 1) * (N == 4 ? B * long(sizeof(Step) / sizeof(vf)) : (N * N + N + LANES - 1) / LANES);
}

// B matrices side by side (maps.h): logits and their gradient, `stride` numbers apart; d_comb [B, 4, 4].
template <int B>
INLINE void sinkhorn4_backward(const float* logits, long stride, const float* d_comb, int iters, float eps, vf* room, float* out) {
    Step* steps = reinterpret_cast<Step*>(room);
    Four soft[B], c[B], g[B];
    const int count = 2 * iters - 1;
    for (int b = 0; b < B; b++)
        for (int i = 0; i < Four::PARTS; i++) {
            vf v = load(logits + b * stride + i * LANES), e = exp(v - row_largest(v));
            soft[b].part[i] = e / row_sums(e);
            c[b].part[i] = soft[b].part[i] + eps;
            g[b].part[i] = load(d_comb + 16 * b + i * LANES);
        }
    for (int s = 0; s < count; s++)
        for (int b = 0; b < B; b++) {
            Step& step = steps[s * B + b];
            vf columns = s % 2 ? vf{} : column_sums(c[b]);
            for (int i = 0; i < Four::PARTS; i++) {
                step.inverse.part[i] = 1.0f / ((s % 2 ? row_sums(c[b].part[i]) : columns) + eps);
                step.after.part[i] = c[b].part[i] = c[b].part[i] * step.inverse.part[i];
            }
        }
    for (int s = count - 1; s >= 0; s--)
        for (int b = 0; b < B; b++) {
            const Step& step = steps[s * B + b];
            Four product;
            for (int i = 0; i < Four::PARTS; i++) product.part[i] = g[b].part[i] * step.after.part[i];
            vf columns = s % 2 ? vf{} : column_sums(product);
            for (int i = 0; i < Four::PARTS; i++)
                g[b].part[i] = (g[b].part[i] - (s % 2 ? row_sums(product.part[i]) : columns)) * step.inverse.part[i];
        }
    for (int b = 0; b < B; b++)
        for (int i = 0; i < Four::PARTS; i++) {
            vf y = soft[b].part[i], d = g[b].part[i];
            store(out + b * stride + i * LANES, y * (d - row_sums(d * y)));
        }
}

INLINE void sinkhorn_any_backward(const float* logits, const float* d_comb, int N, int iters, float eps, vf* room, float* out) {
    const int size = N * N, count = 2 * iters - 1;
    float soft[STREAMS * STREAMS], c[STREAMS * STREAMS], g[STREAMS * STREAMS];
    float *after = reinterpret_cast<float*>(room), *inverse = after + count * size;  // of these, N a step
    for (int i = 0; i < N; i++) {
        const float* from = logits + i * N;
        vf e = exp(load_some(from, N) - *std::max_element(from, from + N));
        store_some(soft + i * N, e, N);
        float total = 0;
        for (int j = 0; j < N; j++) total += soft[i * N + j];
        for (int j = 0; j < N; j++) soft[i * N + j] /= total, c[i * N + j] = soft[i * N + j] + eps;
    }
    std::copy(d_comb, d_comb + size, g);
    for (int s = 0; s < count; s++, inverse += N, after += size) {
        int along = s % 2 ? 1 : N, across = s % 2 ? N : 1;
        for (int i = 0; i < N; i++) {
            float total = eps;
            for (int j = 0; j < N; j++) total += c[i * across + j * along];
            inverse[i] = 1.0f / total;
            for (int j = 0; j < N; j++) c[i * across + j * along] *= inverse[i];
        }
        std::copy(c, c + size, after);
    }
    for (int s = count - 1; s >= 0; s--) {
        inverse -= N, after -= size;
        int along = s % 2 ? 1 : N, across = s % 2 ? N : 1;
        for (int i = 0; i < N; i++) {
            float total = 0;
            for (int j = 0; j < N; j++) total += g[i * across + j * along] * after[i * across + j * along];
            for (int j = 0; j < N; j++) g[i * across + j * along] = (g[i * across + j * along] - total) * inverse[i];
        }
    }
    for (int i = 0; i < N; i++) {
        float total = 0;
        for (int j = 0; j < N; j++) total += g[i * N + j] * soft[i * N + j];
        for (int j = 0; j < N; j++) out[i * N + j] = soft[i * N + j] * (g[i * N + j] - total);
    }
}

}  // namespace
