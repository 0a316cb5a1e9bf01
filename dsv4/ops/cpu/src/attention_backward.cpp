// The gradients of sparse_attention: of queries, of rows (which are keys and values at once) and of the sink.
//
// Queries are taken in blocks. First every query of a block by itself: its scores again, from them for each row p (what it
// gives to the row) and ds (the gradient of its score), and the gradient of the query. Then the rows' gradients, threads
// sharing the channels: each goes through the block's queries in their order. So the sums are taken in an order that
// depends on the numbers of queries and rows alone, and what is held besides the gradients is that of one block.
#include "heads.h"
#include "norm.h"
#include "pool.h"

namespace {

constexpr long BLOCK_BYTES = 1 << 20;  // of p and ds: they stay in the second cache
constexpr int ROWS = 4, WIDE = 2;      // of a tile of rows' gradients: rows, vectors of channels

struct Call {
    const void *q, *d_out;
    long n, H, D;
    Pool pools[2];  // window rows, entries
    const int64_t *start[2], *stop[2];
    const int64_t* chosen;  // instead of the second interval
    long K;
    const float *sink, *lse;
    float scale;
    void* d_q;
    float *d_rows[2], *d_sink;

    // The rows of a list that query i reads, at most: how many places they need.
    long most(int list, long i) const {
        if (list && chosen) return K;
        return start[list] ? std::max<long>(0, stop[list][i] - start[list][i]) : 0;
    }
    long rows(int list, long i, int64_t* out) const {
        long count = 0;
        if (list && chosen) {
            for (long k = 0; k < K; k++)
                if (int64_t row = chosen[i * K + k]; row >= 0 && row < pools[1].rows) out[count++] = row;
        } else if (start[list]) {
            long first = std::clamp<long>(start[list][i], 0, pools[list].rows);
            for (long row = first; row < std::min<long>(stop[list][i], pools[list].rows); row++) out[count++] = row;
        }
        return count;
    }
};

// Products of keys with a panel of heads, into out[key][...] of stride `stride`.
struct Products {
    const float* const* keys;
    long count, D, stride;
    float factor, *out;
    template <class V, int N> INLINE void panel(long c, const float* panel) const {
        for (long k = 0; k < count; k += KEYS) {
            V acc[KEYS][N];
            spread<KEYS, N>(panel, keys + k, D, acc);
            for (int m = 0; m < KEYS; m++)
                for (int n = 0; n < N; n++) {
                    V s = acc[m][n] * factor;
                    std::memcpy(out + (k + m) * stride + c + n * lanes<V>(), &s, sizeof s);
                }
        }
    }
};

template <class T> struct Backward {
    const Call& call;
    long H = call.H, D = call.D, heads = padded_heads(H), width = (D + LANES - 1) / LANES * LANES;
    long longest = 0, size = 1;  // rows of a query; queries of a block
    // of a block's queries: q and d_out [2 * heads][width]; ds and p [longest][2 * heads]; rows; how many of each list
    float *both = nullptr, *weights = nullptr, *sinks = nullptr;
    int64_t* rows = nullptr;
    long* counts = nullptr;

    long places() const { return (longest + KEYS - 1) / KEYS * KEYS; }

    void widened(const void* from, long i, float* to) const {
        std::fill(to, to + heads * width, 0.0f);
        for (long h = 0; h < H; h++)
            for (long d = 0; d < D; d += LANES) {
                vf v = load_up_to(static_cast<const T*>(from) + (i * H + h) * D + d, D - d);
                store(to + h * width + d, v);
            }
    }

    // Query i, the block's number a.
    void query(long i, long a, std::vector<const float*>& keys, std::vector<float>& wide, std::vector<float>& panels) const {
        float *q = both + a * 2 * heads * width, *to = weights + a * places() * 2 * heads, *delta = sinks + a * heads;
        widened(call.q, i, q);
        widened(call.d_out, i, q + heads * width);
        int64_t* read = rows + a * longest;
        counts[2 * a] = call.rows(0, i, read);
        counts[2 * a + 1] = call.rows(1, i, read + counts[2 * a]);
        long count = counts[2 * a] + counts[2 * a + 1];
        for (long k = 0; k < count; k++) {
            const Pool& pool = call.pools[k >= counts[2 * a]];
            const uint8_t* row = pool.at(read[k]);
            keys[k] = reinterpret_cast<const float*>(row);
            if (pool.kind == F32 && D == width) continue;
            pool.widen_row(row, &wide[k * width], width);
            keys[k] = &wide[k * width];
        }
        for (long k = count; k < places(); k++) keys[k] = count ? keys[count - 1] : q;  // tiles are whole
        std::vector<const float*> of(heads);
        for (int half = 0; half < 2; half++) {  // dp is where ds will be
            const float* from = half ? q : q + heads * width;
            for (long h = 0; h < heads; h++) of[h] = from + h * width;
            lay_panels(of.data(), heads, D, panels.data());
            Products job{keys.data(), count, D, 2 * heads, half ? call.scale : 1.0f, to + half * heads};
            for_panels(panels.data(), heads, D, job);
        }
        for (long h = 0; h < heads; h += LANES) {
            long some = heads - h;
            vf lse = load_up_to(call.lse + i * H + std::min(h, H), std::max<long>(0, H - h)), total = {};
            for (long k = 0; k < count; k++) {
                float *ds = to + k * 2 * heads + h, *p = ds + heads;
                vf given = exp(load_up_to(p, some) - lse);
                total += given * load_up_to(ds, some);
                store_up_to(p, given, some);
            }
            for (long k = 0; k < count; k++) {
                float *ds = to + k * 2 * heads + h, *p = ds + heads;
                store_up_to(ds, (load_up_to(ds, some) - total) * load_up_to(p, some) * call.scale, some);
            }
            store_up_to(delta + h, total, some);
        }
        for (long h = 0; h < H; h++) delta[h] *= -std::exp(call.sink[h] - call.lse[i * H + h]);
        float* mix = panels.data();
        for (long d = 0; d < width;) {
            bool pair = d + MIX_WIDE * LANES <= width;
            for (long h = 0; h < heads; h += MIX_HEADS) {
                if (pair) mix_tile<MIX_WIDE>(to + h, 2 * heads, keys.data(), count, d, mix + h * width, width);
                else mix_tile<1>(to + h, 2 * heads, keys.data(), count, d, mix + h * width, width);
            }
            d += pair ? MIX_WIDE * LANES : LANES;
        }
        T* out = static_cast<T*>(call.d_q) + i * H * D;
        for (long h = 0; h < H; h++)
            for (long d = 0; d < D; d += LANES) store_up_to(out + h * D + d, load(mix + h * width + d), D - d);
    }

    // The gradients of R of query a's rows from the k-th on, N vectors of channels from d on: both, as keys and as values.
    template <int R, int N> INLINE void tile(long a, long k, long d) const {
        const float *from = both + a * 2 * heads * width + d, *weight = weights + (a * places() + k) * 2 * heads;
        vf acc[R][N] = {};
        for (long h = 0; h < 2 * heads; h++) {
            vf v[N];
            for (int i = 0; i < N; i++) v[i] = load(from + h * width + i * LANES);
            for (int r = 0; r < R; r++)
                for (int i = 0; i < N; i++) acc[r][i] = fused(splat(weight[r * 2 * heads + h]), v[i], acc[r][i]);
        }
        for (int r = 0; r < R; r++) {
            float* to = call.d_rows[k + r >= counts[2 * a]] + rows[a * longest + k + r] * D + d;
            for (int i = 0; i < N; i++) {
                long left = D - d - i * LANES;
                store_up_to(to + i * LANES, load_up_to(to + i * LANES, left) + acc[r][i], left);
            }
        }
    }

    template <int N> void channels(long block, long d) const {
        for (long a = 0; a < block; a++) {
            long count = counts[2 * a] + counts[2 * a + 1], k = 0;
            for (; k + ROWS <= count; k += ROWS) tile<ROWS, N>(a, k, d);
            for (; k < count; k++) tile<1, N>(a, k, d);
        }
    }

    void run() {
        for (long i = 0; i < call.n; i++) longest = std::max(longest, call.most(0, i) + call.most(1, i));
        long threads = omp_get_max_threads(), bytes = (places() + 1) * 2 * heads * 4;
        size = std::min(call.n, std::clamp<long>(BLOCK_BYTES / bytes, threads, 64 * threads));
        static thread_local Room room;
        room.open(size * (2 * heads * width * 4 + places() * 2 * heads * 4 + heads * 4 + longest * 8 + 16) + 6 * 64);
        both = room.take<float>(size * 2 * heads * width);
        weights = room.take<float>(size * places() * 2 * heads);
        sinks = room.take<float>(size * heads);
        rows = room.take<int64_t>(size * longest);
        counts = room.take<long>(size * 2);
        std::vector<double> d_sink(H);
        long slices = (width + WIDE * LANES - 1) / (WIDE * LANES);
#pragma omp parallel
        {
            std::vector<const float*> keys(places() + KEYS);
            std::vector<float> wide(longest * width), panels(heads * width);
            for (long first = 0; first < call.n; first += size) {
                long block = std::min(size, call.n - first);
#pragma omp for schedule(dynamic, 1)
                for (long a = 0; a < block; a++) query(first + a, a, keys, wide, panels);
#pragma omp for schedule(static)
                for (long s = 0; s < slices; s++) {
                    long d = s * WIDE * LANES;
                    if (d + WIDE * LANES <= width) channels<WIDE>(block, d);
                    else channels<1>(block, d);
                    for (long a = 0; s == 0 && a < block; a++)
                        for (long h = 0; h < H; h++) d_sink[h] += sinks[a * heads + h];
                }
            }
        }
        for (long h = 0; h < H; h++) call.d_sink[h] = float(d_sink[h]);
    }
};

}  // namespace

// q, d_out, d_q [n, H, D], FP32 or BF16; plain pools as in pool.h; intervals and chosen rows as in attention.cpp; lse [n, H];
// d_window, d_entries FP32 of the pools' shapes, to which is added; d_sink [H].
EXPORT(sparse_attention_backward)
(const void* q, const void* d_out, int is_bf16, long n, long H, long D, const int64_t* window, const int64_t* entries,
 const void* start, const void* stop, const void* entry_start, const void* entry_stop, const void* chosen, long K,
 const float* sink, const float* lse, float scale, void* d_q, float* d_window, float* d_entries, float* d_sink) {
    auto at = [](const void* p) { return static_cast<const int64_t*>(p); };
    Call call{q, d_out, n, H, D, {Pool(window), Pool(entries)}, {at(start), at(entry_start)}, {at(stop), at(entry_stop)},
              at(chosen), K, sink, lse, scale, d_q, {d_window, d_entries}, d_sink};
    if (is_bf16) Backward<bf16>{call}.run();
    else Backward<float>{call}.run();
}
