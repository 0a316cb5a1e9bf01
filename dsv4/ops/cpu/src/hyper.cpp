// Hyper-connections: the maps of a token's N streams (eq. 3-8), and reading, writing and collapsing the streams.
//
// A token's streams are one row x of K = N * M numbers. Its products with the rows of fn are summed in parts that begin
// at fixed places, so that threads may share a long row; within a part one vector belongs to one product (matmul.h).
#include <memory>

#include "calls.h"
#include "maps.h"
#include "matmul.h"

namespace {

constexpr long PART = 4096;      // numbers of a row whose products are summed as one
constexpr long TOKENS = 2 * MR;  // that a part of fn is read for at most: it stays in the second cache

// --- products with fn ---

// What is asked of tokens, rows x of K numbers: their products with `outputs` rows of fn, and their squares.
template <class T> struct Projection {
    const T* x;
    const float* fn;
    long K;
    int outputs;

    static constexpr bool PLAIN = std::is_same<T, float>::value;
    static constexpr long APART = PART + LANES;           // widened rows: not at places that share a line of the cache
    static constexpr long ROOM = PLAIN ? 0 : MR * APART;  // numbers that are widened at a time

    long wide() const { return outputs + 1; }  // numbers for a token: the products, then the sum of squares
    long parts() const { return (K + PART - 1) / PART; }

    // sums[count][wide()] over part p of the rows of `count` tokens from `first` on; `room` has ROOM numbers. Of the outputs
    // those from `low` to `high`; the squares belong to the first.
    void part(long p, long first, long count, float* sums, float* room, int low, int high) const {
        long k = p * PART, width = std::min(PART, K - k);
        for (long t = 0; t < count; t += MR) {
            long tokens = std::min<long>(MR, count - t);
            const T* rows = x + (first + t) * K + k;
            float* to = sums + t * wide();
            for (long m = 0; m < tokens && (low == 0 || !PLAIN); m++) {
                float squares = sum_of_squares(rows + m * K, width, PLAIN ? nullptr : room + m * APART);
                if (low == 0) to[m * wide() + outputs] = squares;
            }
            const float* from;
            if constexpr (PLAIN) from = rows;
            else from = room;
            for (int n = low; n < high; n += NR) {
                int wanted = std::min(NR, high - n);
                PlainRow<float> w[NR];
                for (int i = 0; i < NR; i++) w[i] = {fn + (n + std::min(i, wanted - 1)) * K + k};
                for (long m = t + MR + n / NR; m < std::min(count, t + 2 * MR); m += (outputs + NR - 1) / NR)
                    fetch(x + (first + m) * K + k, width);
                tiles(tokens, from, PLAIN ? K : APART, w, width, to + n, wide(), wanted);
            }
        }
    }

    // Asks the memory for numbers that come next, while products of those before them are summed.
    static INLINE void fetch(const T* from, long count) {
        for (long i = 0; i < count; i += 64 / long(sizeof(T)))
            _mm_prefetch(reinterpret_cast<const char*>(from + i), _MM_HINT_T1);
    }

    // sums [n][wide()] += those of a further part
    void add(const float* more, long n, float* sums) const {
        for (long i = 0; i < n * wide(); i++) sums[i] += more[i];
    }

    void part(long p, long first, long count, float* sums, float* room) const { part(p, first, count, sums, room, 0, outputs); }

    // Calls finish(first, count, sums) for blocks of tokens. Threads share the blocks, or the parts of long rows where
    // there are few tokens, or the outputs of a single block.
    template <class Finish> void run(long n, const Finish& finish) const {
        long threads = omp_get_max_threads(), size = n >= TOKENS * threads ? TOKENS : MR;
        long blocks = (n + size - 1) / size;
        if (blocks == 1 && parts() == 1 && threads > 1 && n * K * outputs > 30000) {
            static thread_local std::vector<float> together;
            together.resize(n * wide());
            float* sums = together.data();
            int tiles = (outputs + NR - 1) / NR;
#pragma omp parallel
            {
                std::unique_ptr<float[]> room(new float[ROOM]);
                int t = omp_get_thread_num(), team = omp_get_num_threads();
                int low = tiles * t / team * NR, high = std::min(tiles * (t + 1) / team * NR, outputs);
                if (low < high) part(0, 0, n, sums, room.get(), low, high);
            }
            return finish(0, n, sums);
        }
        bool share = blocks < threads && parts() > 1;
        std::vector<float> apart(share ? parts() * n * wide() : 0);
#pragma omp parallel if (n * K * outputs > 300000 && (blocks > 1 || share))
        {
            std::unique_ptr<float[]> room(new float[ROOM]);
            if (share) {
#pragma omp for schedule(dynamic, 1) collapse(2)
                for (long p = 0; p < parts(); p++)
                    for (long b = 0; b < blocks; b++) {
                        long first = b * size;
                        part(p, first, std::min(size, n - first), &apart[(p * n + first) * wide()], room.get());
                    }
#pragma omp for schedule(dynamic, 1)
                for (long t = 0; t < n; t++) {
                    for (long p = 1; p < parts(); p++) add(&apart[(p * n + t) * wide()], 1, &apart[t * wide()]);
                    finish(t, 1, &apart[t * wide()]);
                }
            } else {
                std::vector<float> sums(2 * size * wide());
                float* more = sums.data() + size * wide();
#pragma omp for schedule(dynamic, 1)
                for (long b = 0; b < blocks; b++) {
                    long first = b * size, count = std::min(size, n - first);
                    part(0, first, count, sums.data(), room.get());
                    for (long p = 1; p < parts(); p++) {
                        part(p, first, count, more, room.get());
                        add(more, count, sums.data());
                    }
                    finish(first, count, sums.data());
                }
            }
        }
    }
};

// --- maps ---

// pre, post [count, N] and comb [count, N, N] from the products of `count` tokens
void maps(
    float* sums, long count, long K, int N, const Affine& affine, int iters, float eps, float* pre, float* post,
    float* comb) {
    long wide = (2 + N) * N + 1;
    for (long t = 0; t < count; t++) {
        float* logits = sums + t * wide;
        affine.apply(logits, K, {N, N, N * N});
        for (int i = 0; i < 2 * N; i += LANES)
            store_up_to(logits + i, sigmoid(load_up_to(logits + i, 2 * N - i)), 2 * N - i);
        for (int i = 0; i < N; i++) pre[t * N + i] = logits[i] + eps;
        for (int i = 0; i < N; i++) post[t * N + i] = 2 * logits[N + i];
    }
    sinkhorn(sums + 2 * N, wide, comb, count, N, iters, eps);
}

// --- streams ---

// out_k = post_k y + sum_j comb[j][k] x_j, of the channels from `i` to `end`
template <int S, class T>
void write(const T* x, const T* y, int num, long M, const float* post, const float* comb, long i, long end, T* out) {
    const int N = streams<S>(num);
    constexpr int MOST = S ? S : STREAMS;
    vf weight[MOST + 1][MOST];
    for (int k = 0; k < N; k++) {
        weight[0][k] = splat(post[k]);
        for (int j = 0; j < N; j++) weight[j + 1][k] = splat(comb[j * N + k]);
    }
    for (; i < end; i += LANES) {
        vf from[MOST + 1] = {load_up_to(y + i, end - i)};
        for (int j = 0; j < N; j++) from[j + 1] = load_up_to(x + j * M + i, end - i);
        for (int k = 0; k < N; k++) {
            vf v = weight[0][k] * from[0];
            for (int j = 1; j <= N; j++) v = v + weight[j][k] * from[j];
            store_up_to(out + k * M + i, v, end - i);
        }
    }
}

// --- the ops, for streams x [n, N, M] ---

template <class T> struct Streams {
    const T* x;
    long n;
    int N;
    long M;

    const T* token(long t) const { return x + t * N * M; }
    Projection<T> onto(const float* fn, int outputs) const { return {x, fn, N * M, outputs}; }
};

template <class T>
void hyper_maps(
    const Streams<T>& s, const float* fn, const Affine& affine, int iters, float eps, float* pre, float* post,
    float* comb) {
    int N = s.N;
    s.onto(fn, (2 + N) * N).run(s.n, [&](long first, long count, float* sums) {
        maps(sums, count, N * s.M, N, affine, iters, eps, pre + first * N, post + first * N, comb + first * N * N);
    });
}

template <class T>
void hyper_enter(
    const Streams<T>& s, const float* fn, const Affine& affine, const float* gain, int iters, float eps, T* out,
    float* post, float* comb, float* kept) {
    int N = s.N;
    auto read_token = N == 4 ? read<4, T> : read<0, T>;
    long wide = (2 + N) * N + 1;
    s.onto(fn, (2 + N) * N).run(s.n, [&](long first, long count, float* sums) {
        if (kept) std::memcpy(kept + first * wide, sums, count * wide * sizeof(float));
        float pre[TOKENS * STREAMS];
        maps(sums, count, N * s.M, N, affine, iters, eps, pre, post + first * N, comb + first * N * N);
        for (long t = 0; t < count; t++) {
            T* row = out + (first + t) * s.M;
            read_token(s.token(first + t), N, s.M, pre + t * N, row);
            rms_norm(row, s.M, gain, affine.norm_eps);
        }
    });
}

template <class T>
void head_collapse(const Streams<T>& s, const float* fn, const Affine& affine, float eps, T* out, float* kept) {
    int N = s.N;
    auto read_token = N == 4 ? read<4, T> : read<0, T>;
    s.onto(fn, N).run(s.n, [&](long first, long count, float* sums) {
        if (kept) std::memcpy(kept + first * (N + 1), sums, count * (N + 1) * sizeof(float));
        for (long t = 0; t < count; t++) {
            float* weight = sums + t * (N + 1);
            affine.apply(weight, N * s.M, {N});
            store_some(weight, sigmoid(load_some(weight, N)) + eps, N);
            read_token(s.token(first + t), N, s.M, weight, out + (first + t) * s.M);
        }
    });
}

template <class T> void hyper_write(const Streams<T>& s, const T* y, const float* post, const float* comb, T* out) {
    constexpr long STRIP = 2048;
    long N = s.N, M = s.M, strips = (M + STRIP - 1) / STRIP;
    auto write_token = N == 4 ? write<4, T> : write<0, T>;
#pragma omp parallel for schedule(static) collapse(2) if (s.n * N * M > 200000)
    for (long t = 0; t < s.n; t++)
        for (long i = 0; i < strips; i++)
            write_token(
                s.token(t), y + t * M, s.N, M, post + t * N, comb + t * N * N, i * STRIP, std::min(M, (i + 1) * STRIP),
                out + t * N * M);
}

// Calls f with the streams and a number of their kind.
template <class F> void by_kind(const void* x, int is_bf16, long n, int N, long M, const F& f) {
    if (is_bf16) f(Streams<bf16>{static_cast<const bf16*>(x), n, N, M}, bf16());
    else f(Streams<float>{static_cast<const float*>(x), n, N, M}, float());
}

}  // namespace

// logits [n, N, N] -> out [n, N, N], FP32
EXPORT(sinkhorn)(const float* logits, long n, int N, int iters, float eps, float* out) {
    long blocks = (n + 15) / 16;
#pragma omp parallel for schedule(static) if (n > 128)
    for (long b = 0; b < blocks; b++)
        sinkhorn(logits + b * 16 * N * N, N * N, out + b * 16 * N * N, std::min(16l, n - b * 16), N, iters, eps);
}

// x [n, N, M] FP32 or BF16, fn [(2+N)*N, N*M], base, scale [3] -> pre, post [n, N], comb [n, N, N]
EXPORT(hyper_maps)
(const void* x, int is_bf16, long n, int N, long M, const float* fn, const float* base, const float* scale, int iters,
 float eps, float norm_eps, float* pre, float* post, float* comb) {
    by_kind(x, is_bf16, n, N, M, [&](const auto& streams, auto) {
        hyper_maps(streams, fn, {base, scale, norm_eps}, iters, eps, pre, post, comb);
    });
}

// The same -> out [n, M] of x's kind, and post, comb; and, where wanted, what the backward pass needs (hyper_backward.cpp):
// the products with fn, then the sum of squares, [n, (2+N)*N + 1]
EXPORT(hyper_enter)
(const void* x, int is_bf16, long n, int N, long M, const float* fn, const float* base, const float* scale,
 const float* gain, int iters, float eps, float norm_eps, void* out, float* post, float* comb, float* kept) {
    by_kind(x, is_bf16, n, N, M, [&](const auto& streams, auto kind) {
        auto* to = static_cast<decltype(kind)*>(out);
        hyper_enter(streams, fn, {base, scale, norm_eps}, gain, iters, eps, to, post, comb, kept);
    });
}

// x [n, N, M], fn [N, N*M], base [N], scale [1] -> out [n, M]; kept [n, N + 1] as of hyper_enter
EXPORT(head_collapse)
(const void* x, int is_bf16, long n, int N, long M, const float* fn, const float* base, const float* scale, float eps,
 float norm_eps, void* out, float* kept) {
    by_kind(x, is_bf16, n, N, M, [&](const auto& streams, auto kind) {
        head_collapse(streams, fn, {base, scale, norm_eps}, eps, static_cast<decltype(kind)*>(out), kept);
    });
}

// x [n, N, M], y [n, M], post [n, N], comb [n, N, N] -> out [n, N, M]; x, y and out are of one kind
EXPORT(hyper_write)
(const void* x, const void* y, int is_bf16, long n, int N, long M, const float* post, const float* comb, void* out) {
    by_kind(x, is_bf16, n, N, M, [&](const auto& streams, auto kind) {
        typedef decltype(kind) T;
        hyper_write(streams, static_cast<const T*>(y), post, comb, static_cast<T*>(out));
    });
}
