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

constexpr long BLOCK_BYTES = 1 << 18;  // of p and ds: with all else they stay in the second cache
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

// Products of keys with a panel of heads, those of queries and then those of d_out: scores and dp [key][heads].
template <class X> struct Products {
    const X* const* keys;
    long count, D, heads;
    float scale, *scores, *dp;
    template <class V, int N> INLINE void panel(long c, const X* panel) const {
        V factor[N];
        for (int n = 0; n < N; n++)
            for (int i = 0; i < lanes<V>(); i++) factor[n][i] = c + n * lanes<V>() + i < heads ? scale : 1.0f;
        for (long k = 0; k < count; k += KEYS) {
            V acc[KEYS][N];
            spread<KEYS, N>(panel, keys + k, D, acc);
            for (int m = 0; m < KEYS; m++)
                for (int n = 0; n < N; n++) {
                    V v = acc[m][n] * factor[n];  // by 1 too: sums stored as they are would be kept in memory by GCC 12
                    place(v, (k + m) * heads, c + n * lanes<V>());
                }
        }
    }
    template <class V> INLINE void place(V v, long at, long c) const {
#if defined(__AVX512F__)
        if (heads == 8) {  // of which there are both in a vector
            v8 low = (v8)_mm512_castps512_ps256((__m512)v), high = (v8)_mm512_extractf32x8_ps((__m512)v, 1);
            std::memcpy(scores + at, &low, sizeof low);
            std::memcpy(dp + at, &high, sizeof high);
            return;
        }
#endif
        std::memcpy((c < heads ? scores + c : dp + c - heads) + at, &v, sizeof v);
    }
#if defined(__AVX512F__)
    INLINE void place(v8, long, long) const {}  // a panel of eight columns there is not
#endif
};

#if defined(__AVX512BF16__)
INLINE vu halves(vf v) { return widen((vh)_mm512_cvtneps_pbh((__m512)v)); }  // each number as BF16, in the lower bits

// As mix_tile, of two vectors of channels and two keys at a time: pairs [key / 2][heads] of the keys' weights.
INLINE void mix_pairs(const bf16* pairs, long heads, const bf16* const* rows, long count, long d, float* mix,
                      long width) {
    vf acc[MIX_HEADS][2] = {};
    for (long k = 0; k < count; k += 2) {
        __m512i one = load_as<__m512i>(rows[k] + d), other = load_as<__m512i>(rows[k + 1] + d);
        vf low = (vf)_mm512_unpacklo_epi16(one, other), high = (vf)_mm512_unpackhi_epi16(one, other);
        for (int h = 0; h < MIX_HEADS; h++) {
            const bf16* weights = pairs + k * heads + 2 * h;
            acc[h][0] = Spread<bf16>::add(acc[h][0], low, weights);
            acc[h][1] = Spread<bf16>::add(acc[h][1], high, weights);
        }
    }
    vi first, second;  // channels 0 to 3 of eight are in `low`, 4 to 7 in `high`
    for (int i = 0; i < LANES; i++) first[i] = i / 8 * 4 + i % 4 + i / 4 % 2 * LANES, second[i] = first[i] + LANES / 2;
    for (int h = 0; h < MIX_HEADS; h++) {
        store(mix + h * width + d, __builtin_shuffle(acc[h][0], acc[h][1], first));
        store(mix + h * width + d + LANES, __builtin_shuffle(acc[h][0], acc[h][1], second));
    }
}
#endif

// T: of q and d_out. X: as what is multiplied; with BF16 instructions p and ds are rounded to it, all else is so already.
template <class T, class X> struct Backward {
    static constexpr bool PLAIN = std::is_same<X, float>::value;
    static constexpr int STEP = Spread<X>::STEP, PARTS = 2 / STEP;
    const Call& call;
    long H = call.H, D = call.D, heads = padded_heads(H);
    long width = (D + LANES * STEP - 1) / (LANES * STEP) * LANES * STEP;
    long longest = 0, size = 1;  // rows of a query; queries of a block
    // Of a block's queries: q and d_out [PARTS][heads][width][STEP], ds and p [PARTS][places][heads][STEP], two in parts in
    // FP32 and in pairs in BF16; what goes to the sink; the rows' gradients, and how many they are.
    X *both = nullptr, *weights = nullptr;
    float* sinks = nullptr;
    float** into = nullptr;
    long* counts = nullptr;

    long places() const { return (longest + KEYS - 1) / KEYS * KEYS; }

    // What a thread works in.
    struct Work {
        std::vector<const X*> keys;
        std::vector<const T*> of;  // heads of q and d_out
        std::vector<int64_t> rows;
        X *wide, *panels, *pairs;
        float *mix, *scores, *dp, *lse;
    };
    long work_size() const {
        return longest * width * sizeof(X) + 2 * heads * D * sizeof(X) + heads * width * 4 + (heads + LANES) * 4 +
               places() * heads * 10 + 7 * 64;
    }
    Work work_in(Room& room) const {
        Work w{};
        w.keys.resize(places() + KEYS);
        w.of.resize(2 * heads);
        w.rows.resize(longest);
        w.wide = room.take<X>(longest * width);
        w.panels = room.take<X>(2 * heads * D);
        w.mix = room.take<float>(heads * width);
        w.lse = room.take<float>(heads + LANES);
        w.pairs = room.take<X>(PLAIN ? 0 : places() * heads);
        w.scores = room.take<float>(PLAIN ? 0 : places() * heads);
        w.dp = room.take<float>(PLAIN ? 0 : places() * heads);
        return w;
    }

    // Query i, the block's number a.
    void query(long i, long a, Work& w) const {
        X *mine = both + a * 2 * heads * width, *to = weights + a * places() * 2 * heads;
        float* delta = sinks + a * heads;
        const T *q = static_cast<const T*>(call.q) + i * H * D, *d_out = static_cast<const T*>(call.d_out) + i * H * D;
        lay_both(q, d_out, mine);
        int64_t* read = w.rows.data();
        long first = call.rows(0, i, read), count = first + call.rows(1, i, read + first);
        counts[a] = count;
        for (long k = 0; k < count; k++) {
            const Pool& pool = call.pools[k >= first];
            into[a * longest + k] = call.d_rows[k >= first] + read[k] * D;
            const uint8_t* row = pool.at(read[k]);
            X* wide = w.wide + k * width;
            w.keys[k] = D == width && pool.kind == (PLAIN ? F32 : BF16) ? reinterpret_cast<const X*>(row) : wide;
            if (w.keys[k] != wide) continue;
            if constexpr (PLAIN) {
                pool.widen_row(row, wide, width);
            } else {
                std::memcpy(wide, row, D * sizeof(X));
                std::fill(wide + D, wide + width, X(0));
            }
        }
        for (long k = count; k < places(); k++) w.keys[k] = count ? w.keys[count - 1] : mine;  // tiles are whole
        for (long h = 0; h < heads; h++) {
            w.of[h] = h < H ? q + h * D : nullptr, w.of[heads + h] = h < H ? d_out + h * D : nullptr;
            w.lse[h] = h < H ? call.lse[i * H + h] : 0.0f;
        }
        if constexpr (PLAIN) w.dp = to, w.scores = to + places() * heads;  // ds and p will be there
        lay_panels(w.of.data(), 2 * heads, D, w.panels);
        for_panels(w.panels, 2 * heads, D, Products<X>{w.keys.data(), count, D, heads, call.scale, w.scores, w.dp});
        through_softmax(w, count, to, delta);
        for (long h = 0; h < H; h++) delta[h] *= -std::exp(call.sink[h] - call.lse[i * H + h]);
        mix(w, count, to);
        T* out = static_cast<T*>(call.d_q) + i * H * D;
        for (long h = 0; h < H; h++)
            for (long d = 0; d < D; d += LANES) store_up_to(out + h * D + d, load(w.mix + h * width + d), D - d);
    }

    void lay_both(const T* q, const T* d_out, X* to) const {
        if (H < heads || D < width) std::fill(to, to + 2 * heads * width, X(0));
        for (long h = 0; h < H; h++)
            for (long d = 0; d < D; d += LANES) {
                vf one = load_up_to(q + h * D + d, D - d), other = load_up_to(d_out + h * D + d, D - d);
                if constexpr (PLAIN) {
                    store(to + h * width + d, one);
                    store(to + (heads + h) * width + d, other);
                } else {
                    vu pair = as_bits(one) >> 16 | as_bits(other);
                    std::memcpy(to + (h * width + d) * STEP, &pair, sizeof pair);
                }
            }
    }

    // From scores and dp: p, ds, and for each head `total`, the sum of p dp. With eight heads a vector of sixteen lanes holds
    // two keys.
    void through_softmax(Work& w, long count, [[maybe_unused]] X* to, float* total) const {
        float *s = w.scores, *dp = w.dp;
        long even = (count + 1) / 2 * 2;
        if (even > count) {
            std::fill(s + count * heads, s + even * heads, -INFINITY);
            std::fill(dp + count * heads, dp + even * heads, 0.0f);
        }
        bool pair = LANES > heads;
        if (pair) std::copy(w.lse, w.lse + 8, w.lse + 8);
        long wide = pair ? LANES : heads, steps = even * heads / wide;
        for (long h = 0; h < wide; h += LANES) {
            vf lse = load(w.lse + h), sum = {};
            for (long k = 0; k < steps; k++) {
                vf p = exp(load(s + k * wide + h) - lse);
                store(s + k * wide + h, p);
                sum += p * load(dp + k * wide + h);
            }
            if (pair) sum += swapped(sum);
            store_up_to(total + h, sum, heads - h);
            auto ds = [&](long at) { return (load(dp + at) - sum) * load(s + at) * call.scale; };
            if constexpr (PLAIN) {
                for (long k = 0; k < steps; k++) store(dp + k * wide + h, ds(k * wide + h));
            } else {
#if defined(__AVX512BF16__)
                auto both = [&](long at) {
                    vu low = halves(ds(at)), out = low | halves(load(s + at)) << 16;
                    std::memcpy(to + 2 * at, &out, sizeof out);
                    return low;
                };
                for (long k = 0; k < even; k += 2) {
                    vu one = both(k * heads + h);
                    if (pair) {
                        v8 half[2];
                        std::memcpy(half, &one, sizeof one);
                        auto out = _mm256_or_si256((__m256i)half[0], _mm256_slli_epi32((__m256i)half[1], 16));
                        std::memcpy(w.pairs + k * heads, &out, sizeof out);
                    } else {
                        vu out = one | both((k + 1) * heads + h) << 16;
                        std::memcpy(w.pairs + k * heads + 2 * h, &out, sizeof out);
                    }
                }
#endif
            }
        }
    }

    // The gradient of a query, for all heads.
    void mix(Work& w, long count, [[maybe_unused]] const X* ds) const {
        for (long d = 0; d < width;) {
            bool pair = d + MIX_WIDE * LANES <= width;
            for (long h = 0; h < heads; h += MIX_HEADS) {
                float* to = w.mix + h * width;
                if constexpr (PLAIN) {
                    if (pair) mix_tile<MIX_WIDE>(ds + h, heads, w.keys.data(), count, d, to, width);
                    else mix_tile<1>(ds + h, heads, w.keys.data(), count, d, to, width);
                } else {
#if defined(__AVX512BF16__)
                    mix_pairs(w.pairs + 2 * h, heads, w.keys.data(), count, d, to, width);
#endif
                }
            }
            d += pair ? MIX_WIDE * LANES : LANES;
        }
    }

    // The gradients of R of query a's rows from the k-th on, N vectors of channels from d on: both, as keys and as values.
    template <int R, int N, bool WHOLE> INLINE void tile(long a, long k, long d) const {
        const X *from = both + a * 2 * heads * width + d * STEP;
        const X* weight = weights + a * places() * 2 * heads + k * heads * STEP;
        vf acc[R][N] = {};
        for (int part = 0; part < PARTS; part++, weight += (places() - 1) * heads)
            for (long h = 0; h < heads; h += 8, weight += 8 * STEP)
                for (int j = 0; j < 8; j++, from += width * STEP) {
                    vf v[N];
                    for (int i = 0; i < N; i++) v[i] = load_as<vf>(from + i * LANES * STEP);
                    for (int r = 0; r < R; r++)
                        for (int i = 0; i < N; i++)
                            acc[r][i] = Spread<X>::add(acc[r][i], v[i], weight + (r * heads + j) * STEP);
                }
        for (int r = 0; r < R; r++) {
            float* to = into[a * longest + k + r] + d;
            for (int i = 0; i < N; i++, to += LANES) {
                long left = WHOLE ? LANES : D - d - i * LANES;
                if (left > 0) store_up_to(to, load_up_to(to, left) + acc[r][i], left);
            }
        }
    }

    template <int N, bool WHOLE> void channels(long block, long d) const {
        for (long a = 0; a < block; a++) {
            long k = 0;
            for (; k + ROWS <= counts[a]; k += ROWS) tile<ROWS, N, WHOLE>(a, k, d);
            for (; k < counts[a]; k++) tile<1, N, WHOLE>(a, k, d);
        }
    }

    void run() {
        for (long i = 0; i < call.n; i++) longest = std::max(longest, call.most(0, i) + call.most(1, i));
        long threads = omp_get_max_threads(), bytes = (places() + 1) * 2 * heads * sizeof(X);
        size = std::min(call.n, std::clamp<long>(BLOCK_BYTES / bytes, threads, 64 * threads));
        static thread_local Room room;
        room.open(size * ((width + places()) * 2 * heads * sizeof(X) + heads * 4 + longest * 8 + 8) + 5 * 64);
        both = room.take<X>(size * 2 * heads * width);
        weights = room.take<X>(size * places() * 2 * heads);
        sinks = room.take<float>(size * heads);
        into = room.take<float*>(size * longest);
        counts = room.take<long>(size);
        std::vector<double> d_sink(H);
        long slices = (width + WIDE * LANES - 1) / (WIDE * LANES);
#pragma omp parallel
        {
            static thread_local Room mine;
            mine.open(work_size());
            Work work = work_in(mine);
            for (long first = 0; first < call.n; first += size) {
                long block = std::min(size, call.n - first);
#pragma omp for schedule(dynamic, 1)
                for (long a = 0; a < block; a++) query(first + a, a, work);
#pragma omp for schedule(static)
                for (long s = 0; s < slices; s++) {
                    long d = s * WIDE * LANES;
                    if (d + WIDE * LANES <= D) channels<WIDE, true>(block, d);
                    else if (d + WIDE * LANES <= width) channels<WIDE, false>(block, d);
                    else channels<1, false>(block, d);
                    for (long a = 0; s == 0 && a < block; a++)
                        for (long h = 0; h < H; h++) d_sink[h] += sinks[a * heads + h];
                }
            }
        }
        for (long h = 0; h < H; h++) call.d_sink[h] = float(d_sink[h]);
    }
};

template <class T> void backward(const Call& call) {
#if defined(__AVX512BF16__)
    if constexpr (std::is_same<T, bf16>::value)
        if (call.D % 2 == 0 && call.pools[0].kind == BF16 && call.pools[1].kind == BF16)
            return Backward<bf16, bf16>{call}.run();
#endif
    Backward<T, float>{call}.run();
}

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
    if (is_bf16) backward<bf16>(call);
    else backward<float>(call);
}
