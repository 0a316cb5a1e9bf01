// Gradients of hyper-connections: of entering a sublayer, of the collapse before the head, and of writing.
//
// Of a forward pass there are the products of each token with fn and its sum of squares (hyper.cpp); all else is computed
// again, token by token. Tokens are cut into slices at places that depend on their number alone: gradients of parameters are
// summed within each slice in the order of tokens, then over the slices, so that no bit depends on the threads.
#include "calls.h"
#include "maps.h"
#include "sinkhorn_backward.h"

namespace {

constexpr int TOKENS = 4;    // that meet a piece of fn while it is at hand
constexpr long PIECE = 16;   // channels, which are one line of the cache: those of one piece lie together, row after row
constexpr long SLICES = 16;  // at most

// Logits of N or of (2 + N) * N outputs, from products; `kind` is which of the scales an output has.
struct Outputs {
    int N, count;
    int kind(int o) const { return o < N ? 0 : o < 2 * N ? 1 : 2; }
    int scales() const { return count == N ? 1 : 3; }
};

template <class T> struct Entered {
    const T* x;
    long n;
    int N;
    long M;
    const float* fn;
    Affine affine;
    const float* gain;  // none: the collapse, of which pre is all
    int iters;
    float eps;
    const float* kept;
    const T* d_out;
    const float *d_post, *d_comb;
    T* d_x;
    float *d_fn, *d_base, *d_scale, *d_gain;

    long K() const { return N * M; }
    Outputs outputs() const { return {N, gain ? (2 + N) * N : N}; }
    long pieces() const { return (M + PIECE - 1) / PIECE; }  // of a stream

    // What a slice has for itself.
    struct Slice {
        std::vector<float> d_fn, d_gain, d_base, d_scale;  // d_fn: pieces as of fn
        std::vector<float> logits, d_logits, d_row, row, weight;
        std::vector<vf> steps;
    };

    // The product of each stream with d [M].
    void products_with_streams(const T* streams, const float* d, float* out) const {
        for (int j = 0; j < N; j++) {
            vf total = {};
            for (long m = 0; m < M; m += LANES)
                total += load_up_to(streams + j * M + m, M - m) * load_up_to(d + m, M - m);
            out[j] = sum(total);
        }
    }

    // The gradient of what was read out of the streams, before the norm: d_row [M]; adds to that of the gain.
    template <int S> void through_norm(const T* streams, const float* pre, const T* d, Slice& s, float* d_row) const {
        T* row = reinterpret_cast<T*>(s.row.data());
        read<S, T>(streams, N, M, pre, row);
        float rho = 1.0f / std::sqrt(sum_of_squares(row, M) / float(M) + affine.norm_eps);
        vf total = {};
        for (long m = 0; m < M; m += LANES) {
            long left = M - m;
            vf r = load_up_to(row + m, left), g = load_up_to(d + m, left);
            store_up_to(&s.d_gain[m], load_up_to(&s.d_gain[m], left) + g * r * rho, left);
            total += r * g * load_up_to(gain + m, left);
        }
        float pull = sum(total) * rho * rho * rho / float(M);
        for (long m = 0; m < M; m += LANES) {
            long left = M - m;
            vf g = load_up_to(d + m, left) * load_up_to(gain + m, left);
            store_up_to(d_row + m, g * rho - load_up_to(row + m, left) * pull, left);
        }
    }

    // B tokens from t on.
    template <int S, int B> void tokens(long t, const float* pieces_of_fn, Slice& s) const {
        const Outputs o = outputs();
        const long wide = o.count + 1, K = this->K();
        const int num = streams<S>(N);
        float rho[B], pull[B], pre[B][STREAMS];
        for (int b = 0; b < B; b++) {
            float *logits = &s.logits[b * wide], *d = &s.d_logits[b * wide], *d_row = &s.d_row[b * M];
            const T *from = x + (t + b) * K, *above = d_out + (t + b) * M;
            std::copy(kept + (t + b) * wide, kept + (t + b + 1) * wide, logits);
            rho[b] = 1.0f / std::sqrt(logits[o.count] / float(K) + affine.norm_eps);
            if (gain) affine.apply(logits, K, {N, N, N * N});
            else affine.apply(logits, K, {N});
            float sig[2 * STREAMS], d_pre[STREAMS];
            const int gates = gain ? 2 * num : num;
            for (int i = 0; i < gates; i += LANES)
                store_up_to(sig + i, sigmoid(load_up_to(logits + i, gates - i)), gates - i);
            for (int j = 0; j < num; j++) pre[b][j] = sig[j] + eps;
            if (gain) through_norm<S>(from, pre[b], above, s, d_row);
            else
                for (long m = 0; m < M; m += LANES) store_up_to(d_row + m, load_up_to(above + m, M - m), M - m);
            products_with_streams(from, d_row, d_pre);
            for (int j = 0; j < num; j++) d[j] = d_pre[j] * sig[j] * (1 - sig[j]);
            for (int j = num; j < gates; j++) d[j] = 2 * d_post[(t + b) * num + j - num] * sig[j] * (1 - sig[j]);
        }
        if (gain) {
            const float *logits = &s.logits[2 * num], *above = d_comb + t * num * num;
            float* d = &s.d_logits[2 * num];
            if (S == 4) sinkhorn4_backward<B>(logits, wide, above, iters, eps, s.steps.data(), d);
            else
                for (int b = 0; b < B; b++)
                    sinkhorn_any_backward(logits + b * wide, above + b * N * N, N, iters, eps, s.steps.data(), d + b * wide);
        }
        for (int b = 0; b < B; b++) {  // logit = scale * product * rho + base
            const float *d = &s.d_logits[b * wide], *product = kept + (t + b) * wide;
            float total = 0;
            for (int i = 0; i < o.count; i++) {
                float scaled = affine.scale[o.kind(i)] * d[i];
                s.d_base[i] += d[i];
                s.d_scale[o.kind(i)] += d[i] * product[i] * rho[b];
                s.weight[i * B + b] = scaled * rho[b];
                total += scaled * product[i];
            }
            pull[b] = -total * rho[b] * rho[b] * rho[b] / float(K);
        }
        for (int j = 0; j < num; j++)
            for (long p = 0; p < pieces(); p++) {
                long at = (j * pieces() + p) * o.count * PIECE;
                for (long m = p * PIECE; m < std::min(M, (p + 1) * PIECE); m += LANES)
                    channels<B>(t, j, m, pieces_of_fn + at + m % PIECE, &s.d_fn[at + m % PIECE], o.count, pull, pre, s);
            }
    }

    // One vector of stream j of B tokens, from channel m on: its gradient, and what it adds to fn's.
    template <int B>
    INLINE void channels(long t, int j, long m, const float* w, float* d_w, int count, const float* pull, const float (*pre)[STREAMS],
                         const Slice& s) const {
        long left = M - m;
        vf from[B], d[B];
        for (int b = 0; b < B; b++) {
            from[b] = load_up_to(x + (t + b) * K() + j * M + m, left);
            d[b] = pull[b] * from[b] + pre[b][j] * load_up_to(&s.d_row[b * M + m], left);
        }
        const float* weight = s.weight.data();
        for (int o = 0; o < count; o++) {
            vf row = load(w + o * PIECE), total = load(d_w + o * PIECE);
            for (int b = 0; b < B; b++) {
                vf by = splat(weight[o * B + b]);
                d[b] = d[b] + by * row;
                total = total + by * from[b];
            }
            store(d_w + o * PIECE, total);
        }
        for (int b = 0; b < B; b++) store_up_to(d_x + (t + b) * K() + j * M + m, d[b], left);
    }

    template <int S> void slice(long first, long last, const float* pieces_of_fn, Slice& s) const {
        const Outputs o = outputs();
        s.d_fn.assign(N * pieces() * o.count * PIECE, 0.0f);
        s.d_gain.assign(gain ? M : 0, 0.0f);
        s.d_base.assign(o.count, 0.0f);
        s.d_scale.assign(o.scales(), 0.0f);
        s.logits.resize(TOKENS * (o.count + 1));
        s.d_logits.resize(TOKENS * (o.count + 1));
        s.d_row.resize(TOKENS * M);
        s.row.resize(gain ? M : 0);
        s.weight.resize(TOKENS * o.count);
        s.steps.resize(gain ? sinkhorn_room(N, iters, TOKENS) : 0);
        long t = first;
        for (; t + TOKENS <= last; t += TOKENS) tokens<S, TOKENS>(t, pieces_of_fn, s);
        for (; t < last; t++) tokens<S, 1>(t, pieces_of_fn, s);
    }

    void run() const {
        const Outputs o = outputs();
        std::vector<float> pieces_of_fn(N * pieces() * o.count * PIECE);
        each_number([&](long at, long place) { pieces_of_fn[at] = fn[place]; });
        long size = (std::max(1l, (n + SLICES - 1) / SLICES) + TOKENS - 1) / TOKENS * TOKENS, count = (n + size - 1) / size;
        std::vector<Slice> slices(count);
#pragma omp parallel for schedule(dynamic, 1) if (n * K() > 20000)
        for (long i = 0; i < count; i++) {
            auto work = N == 4 ? &Entered::slice<4> : &Entered::slice<0>;
            (this->*work)(i * size, std::min(n, (i + 1) * size), pieces_of_fn.data(), slices[i]);
        }
        auto total = [&](std::vector<float> Slice::* of, long at) {
            float sum = 0;
            for (const Slice& s : slices) sum += (s.*of)[at];
            return sum;
        };
        each_number([&](long at, long place) { d_fn[place] = total(&Slice::d_fn, at); });
        for (int i = 0; i < o.count; i++) d_base[i] = total(&Slice::d_base, i);
        for (int i = 0; i < o.scales(); i++) d_scale[i] = total(&Slice::d_scale, i);
        for (long m = 0; gain && m < M; m++) d_gain[m] = total(&Slice::d_gain, m);
    }

    // Calls f with the place of every number of fn in pieces, and in fn.
    template <class F> void each_number(const F& f) const {
        const int count = outputs().count;
        for (int j = 0; j < N; j++)
            for (long p = 0; p < pieces(); p++)
                for (int i = 0; i < count; i++)
                    for (long m = p * PIECE; m < std::min(M, (p + 1) * PIECE); m++)
                        f(((j * pieces() + p) * count + i) * PIECE + m % PIECE, i * K() + j * M + m);
    }
};

// --- writing ---

// Sums over channels of R rows with the N of g.
template <int S, int R, class T> INLINE void row_products(const T* const* rows, const T* g, int num, long M, float* const* out) {
    const int N = streams<S>(num);
    vf sums[R][S ? S : STREAMS] = {};
    for (long m = 0; m < M; m += LANES) {
        vf from[R];
        for (int r = 0; r < R; r++) from[r] = load_up_to(rows[r] + m, M - m);
        for (int k = 0; k < N; k++) {
            vf above = load_up_to(g + k * M + m, M - m);
            for (int r = 0; r < R; r++) sums[r][k] += from[r] * above;
        }
    }
    for (int r = 0; r < R; r++)
        for (int k = 0; k < N; k++) out[r][k] = sum(sums[r][k]);
}

// One token's gradients: g [N, M] is that of the new streams.
template <int S, class T>
void written(const T* x, const T* y, const T* g, int num, long M, const float* post, const float* comb, T* d_x, T* d_y,
             float* d_post, float* d_comb) {
    const int N = streams<S>(num);
    constexpr int MOST = S ? S : STREAMS;
    vf weight[MOST + 1][MOST];
    const T* rows[MOST + 1];
    float* products[MOST + 1];
    for (int j = 0; j <= N; j++) {
        rows[j] = j < N ? x + j * M : y;
        products[j] = j < N ? d_comb + j * N : d_post;
        for (int k = 0; k < N; k++) weight[j][k] = splat(j < N ? comb[j * N + k] : post[k]);
    }
    for (long m = 0; m < M; m += LANES) {
        vf above[MOST];
        for (int k = 0; k < N; k++) above[k] = load_up_to(g + k * M + m, M - m);
        for (int j = 0; j <= N; j++) {
            vf v = weight[j][0] * above[0];
            for (int k = 1; k < N; k++) v = v + weight[j][k] * above[k];
            store_up_to(j < N ? d_x + j * M + m : d_y + m, v, M - m);
        }
    }
    int j = 0;
    for (; j + 2 <= N + 1; j += 2) row_products<S, 2>(rows + j, g, num, M, products + j);
    if (j <= N) row_products<S, 1>(rows + j, g, num, M, products + j);
}

template <class T>
void write_backward(const void* x, const void* y, const void* d_out, long n, int N, long M, const float* post, const float* comb,
                    void* d_x, void* d_y, float* d_post, float* d_comb) {
    auto in = [](const void* p, long at) { return static_cast<const T*>(p) + at; };
    auto out = [](void* p, long at) { return static_cast<T*>(p) + at; };
    auto token = N == 4 ? written<4, T> : written<0, T>;
#pragma omp parallel for schedule(static) if (n * N * M > 100000)
    for (long t = 0; t < n; t++)
        token(in(x, t * N * M), in(y, t * M), in(d_out, t * N * M), N, M, post + t * N, comb + t * N * N, out(d_x, t * N * M),
              out(d_y, t * M), d_post + t * N, d_comb + t * N * N);
}

template <class T>
void enter_backward(const void* x, long n, int N, long M, const float* fn, const float* base, const float* scale, const float* gain,
                    int iters, float eps, float norm_eps, const float* kept, const void* d_out, const float* d_post,
                    const float* d_comb, void* d_x, float* d_fn, float* d_base, float* d_scale, float* d_gain) {
    Entered<T>{static_cast<const T*>(x), n, N, M, fn, {base, scale, norm_eps}, gain, iters, eps, kept,
               static_cast<const T*>(d_out), d_post, d_comb, static_cast<T*>(d_x), d_fn, d_base, d_scale, d_gain}.run();
}

}  // namespace

// What hyper_enter was given and kept; d_out [n, M] of x's kind, d_post [n, N], d_comb [n, N, N] FP32 -> d_x of x's kind, and
// the gradients of the parameters. Without a gain: what head_collapse was given, and no d_post, d_comb, d_gain.
EXPORT(hyper_enter_backward)
(const void* x, int is_bf16, long n, int N, long M, const float* fn, const float* base, const float* scale, const float* gain,
 int iters, float eps, float norm_eps, const float* kept, const void* d_out, const float* d_post, const float* d_comb, void* d_x,
 float* d_fn, float* d_base, float* d_scale, float* d_gain) {
    auto work = is_bf16 ? enter_backward<bf16> : enter_backward<float>;
    work(x, n, N, M, fn, base, scale, gain, iters, eps, norm_eps, kept, d_out, d_post, d_comb, d_x, d_fn, d_base, d_scale, d_gain);
}

// What hyper_write was given, and d_out [n, N, M] -> the gradients of x, y, post and comb; x, y, d_out, d_x, d_y of one kind
EXPORT(hyper_write_backward)
(const void* x, const void* y, const void* d_out, int is_bf16, long n, int N, long M, const float* post, const float* comb,
 void* d_x, void* d_y, float* d_post, float* d_comb) {
    auto work = is_bf16 ? write_backward<bf16> : write_backward<float>;
    work(x, y, d_out, n, N, M, post, comb, d_x, d_y, d_post, d_comb);
}
