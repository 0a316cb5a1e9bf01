// RMSNorm of rows under autograd, and its gradient: with a gain; or without one and rotated, which is how queries are made.
#include "norm.h"

namespace {

constexpr long SLICES = 16;  // at most, in which gradients of a gain are summed, cut by the number of rows alone

template <class T> void norm(const T* x, long n, long W, const float* gain, float eps, T* out) {
#pragma omp parallel for schedule(static) if (n * W > 20000)
    for (long i = 0; i < n; i++) {
        std::memcpy(out + i * W, x + i * W, W * sizeof(T));
        rms_norm(out + i * W, W, gain, eps);
    }
}

template <class T> void norm_backward(const T* x, const T* d_out, long n, long W, const float* gain, float eps, T* d_x, float* d_gain) {
    long size = std::max(1l, (n + SLICES - 1) / SLICES), count = (n + size - 1) / size;
    std::vector<float> gains(count * W);
#pragma omp parallel for schedule(static) if (n * W > 20000)
    for (long s = 0; s < count; s++)
        for (long i = s * size; i < std::min(n, (s + 1) * size); i++) {
            const T *row = x + i * W, *d = d_out + i * W;
            float rho = 1.0f / std::sqrt(sum_of_squares(row, W) / float(W) + eps), *mine = &gains[s * W];
            vf total = {};
            for (long c = 0; c < W; c += LANES) {
                long left = W - c;
                vf r = load_up_to(row + c, left), g = load_up_to(d + c, left);
                store_up_to(mine + c, load_up_to(mine + c, left) + g * r * rho, left);
                total += r * g * load_up_to(gain + c, left);
            }
            float pull = sum(total) * rho * rho * rho / float(W);
            for (long c = 0; c < W; c += LANES) {
                long left = W - c;
                vf g = load_up_to(d + c, left) * load_up_to(gain + c, left);
                store_up_to(d_x + i * W + c, g * rho - load_up_to(row + c, left) * pull, left);
            }
        }
    std::fill(d_gain, d_gain + W, 0.0f);
    for (long s = 0; s < count; s++)
        for (long c = 0; c < W; c++) d_gain[c] += gains[s * W + c];
}

template <class T> void turned_norm(T* rows, long n, long heads, long W, float eps, const float* turn, long pairs, float* rho) {
    long plain = W - 2 * pairs;
#pragma omp parallel for schedule(static) if (n * W > 20000)
    for (long i = 0; i < n; i++) {
        T* row = rows + i * W;
        rho[i] = 1.0f / std::sqrt(sum_of_squares(row, W) / float(W) + eps);
        for (long c = 0; c < W; c += LANES) store_up_to(row + c, load_up_to(row + c, W - c) * rho[i], W - c);
        turn_pairs(row + plain, row + plain, turn + i / heads * 2 * pairs, pairs, 1.0f);
    }
}

template <class T>
void turned_norm_backward(const T* out, const T* d_out, long n, long heads, long W, const float* turn, long pairs, const float* rho,
                          T* d_rows) {
    long plain = W - 2 * pairs;
#pragma omp parallel for schedule(static) if (n * W > 20000)
    for (long i = 0; i < n; i++) {
        const T *row = out + i * W, *d = d_out + i * W;
        T* to = d_rows + i * W;
        vf total = {};
        for (long c = 0; c < W; c += LANES) total += load_up_to(row + c, W - c) * load_up_to(d + c, W - c);
        float mean = sum(total) / float(W);  // the same before and after a rotation
        for (long c = 0; c < W; c += LANES)
            store_up_to(to + c, (load_up_to(d + c, W - c) - load_up_to(row + c, W - c) * mean) * rho[i], W - c);
        turn_pairs(to + plain, to + plain, turn + i / heads * 2 * pairs, pairs, -1.0f);
    }
}

}  // namespace

// x, out [n, W], FP32 or BF16; gain FP32 [W]. out = x / rms(x) * gain.
EXPORT(norm)(const void* x, int is_bf16, long n, long W, const float* gain, float eps, void* out) {
    if (is_bf16) norm(static_cast<const bf16*>(x), n, W, gain, eps, static_cast<bf16*>(out));
    else norm(static_cast<const float*>(x), n, W, gain, eps, static_cast<float*>(out));
}

EXPORT(norm_backward)
(const void* x, const void* d_out, int is_bf16, long n, long W, const float* gain, float eps, void* d_x, float* d_gain) {
    if (is_bf16)
        norm_backward(static_cast<const bf16*>(x), static_cast<const bf16*>(d_out), n, W, gain, eps, static_cast<bf16*>(d_x), d_gain);
    else
        norm_backward(static_cast<const float*>(x), static_cast<const float*>(d_out), n, W, gain, eps, static_cast<float*>(d_x),
                      d_gain);
}

// rows [n, W], `heads` of them a token, in place: x / rms(x), then the last 2 * pairs numbers times the token's turn, which
// has length 1; rho FP32 [n]: one over each row's rms.
EXPORT(turned_norm)(void* rows, int is_bf16, long n, long heads, long W, float eps, const float* turn, long pairs, float* rho) {
    if (is_bf16) turned_norm(static_cast<bf16*>(rows), n, heads, W, eps, turn, pairs, rho);
    else turned_norm(static_cast<float*>(rows), n, heads, W, eps, turn, pairs, rho);
}

// out: what came out of it -> d_rows
EXPORT(turned_norm_backward)
(const void* out, const void* d_out, int is_bf16, long n, long heads, long W, const float* turn, long pairs, const float* rho,
 void* d_rows) {
    if (is_bf16)
        turned_norm_backward(static_cast<const bf16*>(out), static_cast<const bf16*>(d_out), n, heads, W, turn, pairs, rho,
                             static_cast<bf16*>(d_rows));
    else
        turned_norm_backward(static_cast<const float*>(out), static_cast<const float*>(d_out), n, heads, W, turn, pairs, rho,
                             static_cast<float*>(d_rows));
}
