// Choosing rows: by the indexer's scores, by scores that are given, and of a list.
//
// A score depends on its query and its key alone, and the choice on the scores alone: so neither blocks of queries, nor
// tiles of keys, nor the threads among which keys are shared change it.
#include "calls.h"
#include "choose.h"
#include "heads.h"
#include "pool.h"
#include "whole.h"

namespace {

constexpr long TILE = 128;  // keys whose scores are held
constexpr long AHEAD = 16;  // rows by which memory is asked for before they are unpacked

struct Call {
    const void* q;
    long n, H, D;
    const float* weights;
    Pool keys;
    const int64_t *start, *stop;
    long k;
    int64_t* out;

    INLINE long first(long i) const { return std::clamp<long>(start[i], 0, keys.rows); }
    INLINE long last(long i) const { return std::max(first(i), std::min<long>(stop[i], keys.rows)); }
};

// What queries and keys are multiplied as: FP32, BF16, or whole numbers (int8_t).
template <class X> struct Multiplied_as {
    typedef X Key;
    static long column(long D) { return D; }  // numbers of a panel for one head
    template <int M, int N, class V> static INLINE void spread(const X* panel, const Key* const* keys, long D, V (*acc)[N]) {
        ::spread<M, N>(panel, keys, D, acc);
    }
};
template <> struct Multiplied_as<int8_t> {
    typedef uint8_t Key;
    static long column(long D) { return whole_panels_size(1, D); }
    template <int M, int N, class V>
    static INLINE void spread(const int8_t* panel, const Key* const* keys, long D, V (*acc)[N]) {
        spread_whole<M, N>(panel, keys, D, acc);
    }
};

INLINE v8 both_halves(vf v) {
#if defined(__AVX512F__)
    return (v8)_mm256_add_ps(_mm512_castps512_ps256((__m512)v), _mm512_extractf32x8_ps((__m512)v, 1));
#else
    return v;
#endif
}

// The sums over lanes of eight vectors: neighbours, then pairs of them, then the halves.
INLINE v8 sums(const v8* t) {
    __m256 a = _mm256_hadd_ps((__m256)t[0], (__m256)t[1]), b = _mm256_hadd_ps((__m256)t[2], (__m256)t[3]);
    __m256 c = _mm256_hadd_ps((__m256)t[4], (__m256)t[5]), d = _mm256_hadd_ps((__m256)t[6], (__m256)t[7]);
    a = _mm256_hadd_ps(a, b), c = _mm256_hadd_ps(c, d);
    return (v8)_mm256_add_ps(_mm256_permute2f128_ps(a, c, 0x20), _mm256_permute2f128_ps(a, c, 0x31));
}

// Scores of a panel: relu, times the heads' weights, summed over heads; a query's heads may go on in the next panel.
template <class X> struct Score {
    typedef Multiplied_as<X> As;
    const typename As::Key* const* keys;
    long count, D, heads;
    const float* weights;  // [columns]
    vf* partial;           // [TILE]: of the query whose heads go on
    float* scores;         // [queries][TILE]

    template <class V, int N> INLINE void panel(long c, const X* panel) const {
        constexpr int L = lanes<V>();
        V w[N];
        for (int n = 0; n < N; n++) w[n] = load_as<V>(weights + c + n * L);
        for (long k = 0; k < count; k += KEYS) {
            V acc[KEYS][N];
            As::template spread<KEYS, N>(panel, keys + k, D, acc);
            for (int n = 0; n < N; n++) {
                long column = c + n * L, query = column / heads, head = column % heads;
                float* to = scores + query * TILE + k;
                V part[KEYS];
                for (int m = 0; m < KEYS; m++) part[m] = acc[m][n] < V{} ? V{} : acc[m][n];
                add<V>(part, w[n], head, k, to);
            }
        }
    }

    template <class V> INLINE void add(V* part, V w, long head, long k, float* to) const {
        v8 folded[KEYS];
        if constexpr (lanes<V>() == 8 && LANES == 16) {
            for (int m = 0; m < KEYS; m++) folded[m] = part[m] * w;
        } else {
#if defined(__AVX512F__)
            if (heads == 8) {  // two queries
                v8 other[KEYS];
                for (int m = 0; m < KEYS; m++) {
                    __m512 product = (__m512)(part[m] * w);
                    folded[m] = (v8)_mm512_castps512_ps256(product), other[m] = (v8)_mm512_extractf32x8_ps(product, 1);
                }
                v8 second = sums(other);
                std::memcpy(to + TILE, &second, sizeof second);
            } else
#endif
            {
                if (head) for (int m = 0; m < KEYS; m++) part[m] = fused(part[m], w, partial[k + m]);
                else for (int m = 0; m < KEYS; m++) part[m] = part[m] * w;
                if (head + LANES < heads) {
                    for (int m = 0; m < KEYS; m++) partial[k + m] = part[m];
                    return;
                }
                for (int m = 0; m < KEYS; m++) folded[m] = both_halves(part[m]);
            }
        }
        v8 total = sums(folded);
        std::memcpy(to, &total, sizeof total);
    }
};

#if defined(__AVX512F__)
// The same for pairs of keys and one query of eight heads, whose weights [16] come twice.
void score_pairs(const int8_t* panel, const uint8_t* pairs, long count, long D, const float* weights, float* scores) {
    const __m512i evens = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odds = _mm512_add_epi32(evens, _mm512_set1_epi32(1));
    vf w = load(weights);
    for (long k = 0; k < count; k += KEYS) {
        vf acc[KEYS / 2][1];
        spread_pairs<KEYS / 2>(panel, pairs + k * whole_size(D), D, acc);
        v8 folded[KEYS];
        for (int p = 0; p < KEYS / 2; p += 2) {
            __m512 part[2];
            for (int i = 0; i < 2; i++) part[i] = (__m512)((acc[p + i][0] < 0.0f ? vf{} : acc[p + i][0]) * w);
            __m512 first = _mm512_permutex2var_ps(part[0], evens, part[1]), second = _mm512_permutex2var_ps(part[0], odds, part[1]);
            folded[2 * p] = (v8)_mm512_castps512_ps256(first), folded[2 * p + 1] = (v8)_mm512_castps512_ps256(second);
            folded[2 * p + 2] = (v8)_mm512_extractf32x8_ps(first, 1), folded[2 * p + 3] = (v8)_mm512_extractf32x8_ps(second, 1);
        }
        v8 total = sums(folded);
        std::memcpy(scores + k, &total, sizeof total);
    }
}
#endif

// PAIRS: of keys, for blocks of one query of eight heads.
template <class T, class X, bool PAIRS = false> struct Index {
    typedef Multiplied_as<X> As;
    static constexpr bool WHOLE = std::is_same<X, int8_t>::value, AS_FP32 = std::is_same<X, float>::value;
    const Call& call;
    long most;  // queries in a block
    long H = call.H, D = call.D, heads = padded_heads(H), width = (D + LANES - 1) / LANES * LANES;

    // What a thread works in.
    struct Work {
        X* panels;
        float *weights, *scores, *wide;
        vf* partial;
        bf16* half;
        uint8_t* whole;
        const typename As::Key* keys[TILE + KEYS];
        const uint8_t* found[TILE];
    };
    long work_size() const {
        return most * ((1 + PAIRS) * heads * (As::column(D) * sizeof(X) + 4) + TILE * 4) + TILE * (width * 8 + sizeof(vf)) + 7 * 64;
    }
    Work work_in(Room& room) const {
        Work work;
        work.panels = room.take<X>((1 + PAIRS) * most * heads * As::column(D));
        work.weights = room.take<float>((1 + PAIRS) * most * heads);
        work.scores = room.take<float>(most * TILE);
        work.wide = room.take<float>(TILE * width);
        work.partial = room.take<vf>(TILE);
        work.half = room.take<bf16>(TILE * width);
        work.whole = room.take<uint8_t>(TILE * 2 * width);
        if constexpr (WHOLE)
            for (long r = 0; r < TILE; r++) work.keys[r] = work.whole + r * whole_size(D);
        return work;
    }

    // The end of the block of queries that begins with i: they see keys from the same one on.
    long block_end(long i) const {
        long j = i + 1;
        while (j < std::min(call.n, i + most) && call.start[j] == call.start[i]) j++;
        return j;
    }

    void lay(Work& work, long i, long j) const {
        if constexpr (PAIRS) return lay_twice(work, i);
        else lay_once(work, i, j);
    }
    void lay_twice(Work& work, long i) const {
        std::vector<const T*> rows(2 * heads, nullptr);
        for (long h = 0; h < 2 * heads; h++) {
            bool there = h / 2 < H;
            rows[h] = there ? static_cast<const T*>(call.q) + (i * H + h / 2) * D : nullptr;
            work.weights[h] = there ? call.weights[i * H + h / 2] : 0.0f;
        }
        lay_whole_panels(rows.data(), 2 * heads, D, work.panels);
    }
    void lay_once(Work& work, long i, long j) const {
        std::vector<const T*> rows((j - i) * heads, nullptr);
        std::fill(work.weights, work.weights + (j - i) * heads, 0.0f);
        for (long a = i; a < j; a++)
            for (long h = 0; h < H; h++) {
                rows[(a - i) * heads + h] = static_cast<const T*>(call.q) + (a * H + h) * D;
                work.weights[(a - i) * heads + h] = call.weights[a * H + h];
            }
        if constexpr (WHOLE) lay_whole_panels(rows.data(), (j - i) * heads, D, work.panels);
        else lay_panels(rows.data(), (j - i) * heads, D, work.panels);
    }

    void find_keys(Work& work, long from, long count) const {
        const Pool& pool = call.keys;
        if constexpr (WHOLE) return whole_keys(pool, from, count, D, work.whole);
        else find_numbers(work, pool, from, count);
    }
    void find_numbers(Work& work, const Pool& pool, long from, long count) const {
        bool in_place = pool.kind == (AS_FP32 ? F32 : BF16);
        pool.addresses(from, count, work.found);
        for (long r = 0; r < count; r++) {
            if (in_place) {
                work.keys[r] = reinterpret_cast<const X*>(work.found[r]);
                continue;
            }
            if (r + AHEAD < count) pool.prefetch(work.found[r + AHEAD]);
            float* row = work.wide + r * width;
            if constexpr (AS_FP32) {
                pool.widen_row(work.found[r], row, width);
                work.keys[r] = row;
            } else {
                pool.narrow_row(work.found[r], work.half + r * width, row, width);
                work.keys[r] = work.half + r * width;
            }
        }
        for (long r = count; r < count + KEYS; r++) work.keys[r] = work.keys[count - 1];  // tiles are whole
    }

    // The keys lo <= row < hi for the queries i <= a < j, whose panels are laid.
    void offer(Work& work, long i, long j, long lo, long hi, Best* best) const {
        for (long from = lo; from < hi; from += TILE) {
            long count = std::min(TILE, hi - from);
            if constexpr (PAIRS) {
#if defined(__AVX512F__)
                whole_pairs(call.keys, from, count, D, work.found, work.whole);
                score_pairs(work.panels, work.whole, count, D, work.weights, work.scores);
#endif
            } else {
                find_keys(work, from, count);
                Score<X> score{work.keys, count, D, heads, work.weights, work.partial, work.scores};
                for_panels(work.panels, (j - i) * heads, As::column(D), score);
            }
            for (long a = i; a < j; a++)
                best[a - i].offer(work.scores + (a - i) * TILE, from, std::min(count, call.last(a) - from));
        }
    }

    void run() const {
        if (!call.n) return;
        std::vector<long> begin_of;
        for (long i = 0; i < call.n; i = block_end(i)) begin_of.push_back(i);
        long blocks = begin_of.size(), threads = omp_get_max_threads(), longest = 0;
        begin_of.push_back(call.n);
        for (long i = 0; i < call.n; i++) longest = std::max(longest, call.last(i) - call.first(i));
        long held = Best::room_for(std::min(call.k, longest));
        // few blocks: the keys of each are shared out
        long parts = 1;
        if (threads > 1 && blocks < 2 * threads)
            parts = std::clamp<long>(longest / (4 * TILE), 1, (2 * threads + blocks - 1) / blocks);
        static thread_local Room shared;
        std::vector<Best> bests;
        shared.open(parts == 1 ? 0 : blocks * parts * most * (held * 8 + 128));
        for (long b = 0; parts > 1 && b < blocks * parts * most; b++) bests.push_back(Best::in(shared, held));
#pragma omp parallel if (double(longest) * call.n * heads * D > 50000)
        {
            static thread_local Room room;
            room.open(work_size() + most * (held * 8 + 128));
            Work work = work_in(room);
            std::vector<Best> own;
            for (long a = 0; parts == 1 && a < most; a++) own.push_back(Best::in(room, held));
            long laid = -1;  // the block whose panels are
#pragma omp for schedule(dynamic, 1)
            for (long item = 0; item < blocks * parts; item++) {
                long i = begin_of[item / parts], j = begin_of[item / parts + 1], part = item % parts;
                Best* best = parts == 1 ? own.data() : bests.data() + item * most;
                long lo = call.first(i), hi = lo;
                for (long a = i; a < j; a++) {
                    long seen = call.last(a) - lo;
                    best[a - i].clear(seen > call.k ? call.k : 0);
                    if (seen > call.k) hi = std::max(hi, lo + seen);
                }
                long share = ((hi - lo + parts - 1) / parts + TILE - 1) / TILE * TILE;
                if (hi > lo) {
                    if (laid != i) lay(work, i, j);
                    laid = i;
                    offer(work, i, j, lo + part * share, std::min(hi, lo + (part + 1) * share), best);
                }
                if (parts == 1)
                    for (long a = i; a < j; a++) finish(a, best[a - i]);
            }
#pragma omp for schedule(static)
            for (long a = 0; a < (parts == 1 ? 0 : call.n); a++) {
                long b = std::upper_bound(begin_of.begin(), begin_of.end(), a) - begin_of.begin() - 1;
                Best* best = bests.data() + b * parts * most + (a - begin_of[b]);
                for (long part = 1; part < parts; part++) best->offer(best[part * most]);
                finish(a, *best);
            }
        }
    }

    void finish(long i, Best& best) const {
        int64_t* out = call.out + i * call.k;
        if (best.k) return best.finish(out, call.k);
        long lo = call.first(i), count = call.last(i) - lo;  // no more than k: there is nothing to choose
        std::fill(out, out + call.k - count, -1);
        for (long r = 0; r < count; r++) out[call.k - count + r] = lo + r;
    }
};

template <class T, class X> void choose_as(const Call& call) {
    long query = padded_heads(call.H) * call.D * sizeof(X);
    long shared = (call.n + 4 * omp_get_max_threads() - 1) / (4 * omp_get_max_threads());
    long most = std::clamp<long>(std::min((1L << 18) / query, shared), 1, 32);
#if defined(__AVX512F__)
    if constexpr (std::is_same<X, int8_t>::value)
        if (most == 1 && padded_heads(call.H) == 8) return Index<T, X, true>{call, 1}.run();
#endif
    Index<T, X>{call, most}.run();
}

// FP4 keys and queries that were rounded as they are: multiplied as whole numbers. Each query decides for itself.
template <class T, class X> void choose(const Call& call) {
    const Pool& keys = call.keys;
    if (keys.kind != FP4 || keys.fp32_scales || keys.tail || keys.block != BLOCK || call.D % BLOCK) return choose_as<T, X>(call);
    long size = call.H * call.D;
    auto rows = [&](long i) { return static_cast<const T*>(call.q) + i * size; };
    std::vector<uint8_t> whole(call.n);
#pragma omp parallel for schedule(static) if (call.n * size > 100000)
    for (long i = 0; i < call.n; i++) whole[i] = is_whole(rows(i), call.H, call.D);
    for (long i = 0, j; i < call.n; i = j) {
        for (j = i + 1; j < call.n && whole[j] == whole[i];) j++;
        Call some{rows(i), j - i, call.H, call.D, call.weights + i * call.H, keys, call.start + i, call.stop + i, call.k,
                  call.out + i * call.k};
        if (whole[i]) choose_as<T, int8_t>(some);
        else choose_as<T, X>(some);
    }
}

}  // namespace

// Queries q [n, H, D] in FP32 or BF16, weights [n, H]; keys as in pool.h; intervals int64 [n] -> rows int64 [n, k].
EXPORT(index_scores_topk)
(const void* q, int is_bf16, long n, long H, long D, const float* weights, const int64_t* keys, const int64_t* start,
 const int64_t* stop, long k, int64_t* out) {
    Call call{q, n, H, D, weights, Pool(keys), start, stop, k, out};
#if defined(__AVX512BF16__)
    if (is_bf16 && D % 2 == 0 && call.keys.fits_bf16()) return choose<bf16, bf16>(call);
#endif
    if (is_bf16) choose<bf16, float>(call);
    else choose<float, float>(call);
}

// The best counts[i] (at most k) of scores [rows] in each interval int64 [n] -> rows int64 [n, k].
EXPORT(best_rows)
(const float* scores, long rows, const int64_t* start, const int64_t* stop, const int64_t* counts, long n, long k,
 int64_t* out) {
#pragma omp parallel if (n > 1 && double(n) * rows > 20000)
    {
        static thread_local Room room;
        long held = Best::room_for(std::min(k, rows));
        room.open(held * 8 + 192);
        Best best = Best::in(room, held);
#pragma omp for schedule(dynamic, 8)
        for (long i = 0; i < n; i++) {
            long lo = std::clamp<long>(start[i], 0, rows), hi = std::max(lo, std::min<long>(stop[i], rows));
            best.clear(std::clamp<long>(counts[i], 0, std::min(k, rows)));
            long whole = (hi - lo) / LANES * LANES;
            best.offer(scores + lo, lo, whole);
            float last[LANES] = {};
            std::copy(scores + lo + whole, scores + hi, last);
            best.offer(last, lo + whole, hi - lo - whole);
            best.finish(out + i * k, k);
        }
    }
}

// Places of the k largest of each row of scores [rows, n], in order -> int64 [rows, k].
EXPORT(topk_lowest)(const void* scores, int is_bf16, long rows, long n, long k, int64_t* out) {
#pragma omp parallel if (rows > 1 && double(rows) * n > 20000)
    {
        std::vector<uint64_t> keys((n + LANES - 1) / LANES * LANES);
#pragma omp for schedule(static)
        for (long r = 0; r < rows; r++) {
            for (long i = 0; i < n; i += LANES) {
                int count = int(std::min<long>(LANES, n - i));
                vf some = is_bf16 ? load_some(static_cast<const bf16*>(scores) + r * n + i, count)
                                  : load_some(static_cast<const float*>(scores) + r * n + i, count);
                vu order = ordered(some);
                for (int lane = 0; lane < LANES; lane++)
                    keys[i + lane] = uint64_t(order[lane]) << 32 | uint32_t(~(i + lane));
            }
            std::partial_sort(keys.begin(), keys.begin() + k, keys.begin() + n, std::greater<uint64_t>());
            for (long i = 0; i < k; i++) out[r * k + i] = int64_t(uint32_t(~keys[i]));
        }
    }
}
