// One softmax over a query's window rows, its entries and the sink.
//
// The rows that a query reads are two lists: its window, and its entries. A list is cut into chunks of CHUNK rows from
// its own beginning; a chunk is reduced by itself (the largest score, the sum of exponentials, the mix of rows) and the
// chunks are added in order. So the bits of an output do not depend on which queries are computed beside it, nor on
// the number of threads, nor on whether consecutive entries come as an interval or as chosen rows.
#include "calls.h"
#include "heads.h"
#include "pool.h"

namespace {

constexpr long CHUNK = 128;
constexpr long SLACK = 32;  // rows by which the intervals of queries that share widened rows may be apart
constexpr long AHEAD = 4;   // rows by which memory is asked for before they are unpacked

struct Call {
    const void* q;
    long n, H, D;
    Pool pools[2];  // window rows, entries
    const int64_t *start[2], *stop[2];
    const int64_t* chosen;  // instead of the second interval
    long K;
    const float* sink;
    float scale;
    void* out;
    float* lse;

    INLINE long first(int list, long i) const { return std::clamp<long>(start[list][i], 0, pools[list].rows); }
    // How many rows a list of query i has.
    long length(int list, long i) const {
        if (list && chosen) {
            const int64_t* rows = chosen + i * K;
            return std::count_if(rows, rows + K, [&](long row) { return there(row); });
        }
        if (!start[list]) return 0;
        return std::max<long>(0, std::min<long>(stop[list][i], pools[list].rows) - first(list, i));
    }
    INLINE bool there(long row) const { return row >= 0 && row < pools[1].rows; }
    // The rows from, from + 1, ... of query i's chosen ones: how many are left, at most CHUNK.
    long pick(long i, long from, long* rows) const {
        long seen = 0, count = 0;
        for (long k = 0; k < K && count < CHUNK; k++)
            if (long row = chosen[i * K + k]; there(row) && seen++ >= from) rows[count++] = row;
        return count;
    }
};

// The reduction of some rows, for all heads: the largest score, the sum of exponentials below it, and the mix of rows
// [heads][width].
struct Mixed {
    float *top, *total, *mix;
    static long size(long heads, long width) { return heads * (width + 2) * 4 + 3 * 64; }
    static Mixed in(Room& room, long heads, long width) {
        long some = std::max<long>(heads, LANES);
        return {room.take<float>(some), room.take<float>(some), room.take<float>(heads * width)};
    }
};

// sum = sum + part, of heads h0 <= h < h1, which are a multiple of 8.
void add(Mixed sum, Mixed part, long h0, long h1, long width) {
    for (long h = h0; h < h1; h += 8) {
        alignas(64) float old[16] = {}, fresh[16] = {};
        for (int i = 0; i < 8; i++) {
            float top = sum.top[h + i], other = part.top[h + i];
            float both = other > top ? other : top;
            float base = both > -INFINITY || both != both ? both : 0.0f;
            old[i] = top - base, fresh[i] = other - base;
            sum.top[h + i] = both;
        }
        for (int i = 0; i < 8; i += LANES) store(old + i, exp(load(old + i))), store(fresh + i, exp(load(fresh + i)));
        for (int i = 0; i < 8; i++) {
            sum.total[h + i] = std::fma(sum.total[h + i], old[i], part.total[h + i] * fresh[i]);
            float* mix = sum.mix + (h + i) * width;
            const float* more = part.mix + (h + i) * width;
            vf a = splat(old[i]), b = splat(fresh[i]);
            for (long d = 0; d < width; d += LANES) store(mix + d, fused(load(mix + d), a, load(more + d) * b));
        }
    }
}

// Scores of a panel: scores[key][heads].
template <class X> struct Score {
    const X* const* keys;
    long count, D, heads;
    float scale, *scores;
    template <class V, int N> INLINE void panel(long c, const X* panel) const {
        for (long k = 0; k < count; k += KEYS) {
            V acc[KEYS][N];
            spread<KEYS, N>(panel, keys + k, D, acc);
            for (int m = 0; m < KEYS; m++)
                for (int n = 0; n < N; n++) {
                    V s = acc[m][n] * scale;
                    std::memcpy(scores + (k + m) * heads + c + n * lanes<V>(), &s, sizeof s);
                }
        }
    }
};

// What a thread works in. X: what scores are multiplied as.
template <class X> struct Work {
    const X* keys[CHUNK + KEYS];
    const float* rows[CHUNK];
    const uint8_t* found[CHUNK + SLACK];
    long picked[CHUNK];
    float *scores, *wide;  // wide, half: rows that were widened, in FP32 and for the scores in BF16
    bf16* half;
    Mixed part;

    static long size(long heads, long width) {
        return Mixed::size(heads, width) + (CHUNK + KEYS) * heads * 4 + (CHUNK + SLACK) * width * 6 + 3 * 64;
    }
    Work(Room& room, long heads, long width)
        : scores(room.take<float>((CHUNK + KEYS) * heads)), wide(room.take<float>((CHUNK + SLACK) * width)),
          half(room.take<bf16>((CHUNK + SLACK) * width)), part(Mixed::in(room, heads, width)) {}
};

template <class T, class X> struct Attention {
    const Call& call;
    long H = call.H, D = call.D, heads = padded_heads(H), width = (D + LANES - 1) / LANES * LANES;

    long panels_size() const { return heads * D; }

    void lay(long i, X* panels) const {
        std::vector<const T*> rows(heads, nullptr);
        for (long h = 0; h < H; h++) rows[h] = static_cast<const T*>(call.q) + (i * H + h) * D;
        lay_panels(rows.data(), heads, D, panels);
    }

    void begin(Mixed state) const {
        for (long h = 0; h < heads; h++) {
            state.top[h] = h < H ? call.sink[h] : 0.0f;
            state.total[h] = state.top[h] == -INFINITY ? 0.0f : 1.0f;
        }
        std::fill(state.mix, state.mix + heads * width, 0.0f);
    }

    void finish(long i, Mixed state) const {
        for (long h = 0; h < H; h++) {
            float total = state.total[h], inverse = total == 0 ? 0.0f : 1 / total;
            T* out = static_cast<T*>(call.out) + (i * H + h) * D;
            const float* mix = state.mix + h * width;
            long d = 0;
            for (; d + LANES <= D; d += LANES) store(out + d, load(mix + d) * inverse);
            if (d < D) store_some(out + d, load(mix + d) * inverse, int(D - d));
            call.lse[i * H + h] = state.top[h] + std::log(total);
        }
    }

    // Whether rows of a pool are multiplied where they lie.
    bool in_place(const Pool& pool) const { return pool.kind == F32 && D == width; }
    bool keys_in_place(const Pool& pool) const { return !std::is_same<X, float>::value && pool.kind == BF16; }

    // Rows `found` of a pool, which the pointers of work are set to from now on (see `use`).
    void widen(Work<X>& work, const Pool& pool, long count) const {
        if (in_place(pool)) return;
        for (long r = 0; r < count; r++) {
            if (r + AHEAD < count) pool.prefetch(work.found[r + AHEAD]);
            float* row = work.wide + r * width;
            pool.widen_row(work.found[r], row, width);
            if constexpr (!std::is_same<X, float>::value)
                if (!keys_in_place(pool)) as_bf16(row, work.half + r * width, width);
        }
    }

    // Reduce `count` of the rows found, from the one at `at`, for query panels.
    void reduce(Work<X>& work, const Pool& pool, const X* panels, long at, long count) const {
        for (long r = 0; r < count; r++) {
            const void* lies = work.found[at + r];
            work.rows[r] = in_place(pool) ? static_cast<const float*>(lies) : work.wide + (at + r) * width;
            if constexpr (std::is_same<X, float>::value) work.keys[r] = work.rows[r];
            else work.keys[r] = keys_in_place(pool) ? static_cast<const X*>(lies) : work.half + (at + r) * width;
        }
        for (long r = count; r < count + KEYS; r++) work.keys[r] = work.keys[count - 1];  // tiles are whole
        for_panels(panels, heads, D, Score<X>{work.keys, count, D, heads, call.scale, work.scores});
        softmax(work, count);
        for (long d = 0; d < width;) {
            bool both = d + MIX_WIDE * LANES <= width;
            for (long h = 0; h < heads; h += MIX_HEADS) {
                float* to = work.part.mix + h * width;
                if (both) mix_tile<MIX_WIDE>(work.scores + h, heads, work.rows, count, d, to, width);
                else mix_tile<1>(work.scores + h, heads, work.rows, count, d, to, width);
            }
            d += both ? MIX_WIDE * LANES : LANES;
        }
    }

    // Scores become exponentials below the largest; with eight heads a vector of sixteen lanes holds two keys.
    void softmax(Work<X>& work, long count) const {
        float* s = work.scores;
        constexpr bool may_pair = LANES > 8;
        bool pair = may_pair && heads == 8;
        if (pair && count % 2) std::fill(s + count * 8, s + count * 8 + 8, -INFINITY);
        long wide = pair ? LANES : heads, steps = pair ? (count + 1) / 2 : count;
        for (long h = 0; h < wide; h += LANES) {
            vf top = splat(-INFINITY);
            for (long k = 0; k < steps; k++) top = max(load(s + k * wide + h), top);
            if (pair) top = max(top, swapped(top));
            vf base = top == -INFINITY ? vf{} : top, total = {};
            for (long k = 0; k < steps; k++) {
                vf p = exp(load(s + k * wide + h) - base);
                store(s + k * wide + h, p);
                total += p;
            }
            if (pair) total += swapped(total);
            store(work.part.top + h, top);
            store(work.part.total + h, total);
        }
    }

    // --- many queries: neighbours share the rows that are widened for them ---

    // The end of the block of queries that begins with i: intervals of nearly the same beginning.
    long block_end(long i, long most) const {
        long j = i + 1;
        for (; j < std::min(call.n, i + most); j++)
            for (int list = 0; list < 2; list++)
                if (call.start[list] && !(list && call.chosen) &&
                    std::abs(call.start[list][j] - call.start[list][i]) >= SLACK)
                    return j;
        return j;
    }

    void intervals(Work<X>& work, int list, long i, long j, const X* panels, const Mixed* states) const {
        const Pool& pool = call.pools[list];
        long longest = 0;
        for (long a = i; a < j; a++) longest = std::max(longest, call.length(list, a));
        for (long c = 0; c < longest; c += CHUNK) {
            long lo = INT64_MAX, hi = 0;
            for (long a = i; a < j; a++)
                if (long length = call.length(list, a); length > c) {
                    long first = call.first(list, a) + c;
                    lo = std::min(lo, first), hi = std::max(hi, first + std::min(CHUNK, length - c));
                }
            pool.addresses(lo, hi - lo, work.found);
            widen(work, pool, hi - lo);
            for (long a = i; a < j; a++)
                if (long length = call.length(list, a); length > c) {
                    long at = call.first(list, a) + c - lo;
                    reduce(work, pool, panels + (a - i) * panels_size(), at, std::min(CHUNK, length - c));
                    add(states[a - i], work.part, 0, heads, width);
                }
        }
    }

    // A chunk of query i alone, its rows found and widened.
    void chunk(Work<X>& work, int list, long i, long from, long length, const X* panels) const {
        const Pool& pool = call.pools[list];
        long count = std::min(CHUNK, length - from);
        if (list && call.chosen) {
            call.pick(i, from, work.picked);
            for (long r = 0; r < count; r++) work.found[r] = pool.at(work.picked[r]);
        } else {
            pool.addresses(call.first(list, i) + from, count, work.found);
        }
        widen(work, pool, count);
        reduce(work, pool, panels, 0, count);
    }

    void many(long most) const {
        long blocks = 0;  // their ends are found twice, so that no list of them is held
        for (long i = 0; i < call.n; i = block_end(i, most)) blocks++;
        std::vector<long> begin_of;
        begin_of.reserve(blocks + 1);
        for (long i = 0; i < call.n; i = block_end(i, most)) begin_of.push_back(i);
        begin_of.push_back(call.n);
#pragma omp parallel
        {
            static thread_local Room room;
            long for_query = panels_size() * sizeof(X) + 64 + Mixed::size(heads, width);
            room.open(Work<X>::size(heads, width) + most * for_query);
            Work<X> work(room, heads, width);
            X* panels = room.take<X>(most * panels_size());
            std::vector<Mixed> states;
            for (long a = 0; a < most; a++) states.push_back(Mixed::in(room, heads, width));
#pragma omp for schedule(dynamic, 1)
            for (long b = 0; b < blocks; b++) {
                long i = begin_of[b], j = begin_of[b + 1];
                for (long a = i; a < j; a++) lay(a, panels + (a - i) * panels_size()), begin(states[a - i]);
                intervals(work, 0, i, j, panels, states.data());
                if (!call.chosen && call.start[1]) intervals(work, 1, i, j, panels, states.data());
                if (call.chosen)
                    for (long a = i; a < j; a++) {
                        long length = call.length(1, a);
                        for (long from = 0; from < length; from += CHUNK) {
                            chunk(work, 1, a, from, length, panels + (a - i) * panels_size());
                            add(states[a - i], work.part, 0, heads, width);
                        }
                    }
                for (long a = i; a < j; a++) finish(a, states[a - i]);
            }
        }
    }

    // --- few queries: their chunks are shared out, some at a time, and added in order ---

    void few() const {
        long threads = omp_get_max_threads(), slots = 4 * threads, n = call.n;
        std::vector<long> chunks(n + 1, 0), windows(n), lengths(2 * n);
        double products = 0;
        for (long i = 0; i < n; i++) {
            for (int list = 0; list < 2; list++) {
                lengths[2 * i + list] = call.length(list, i);
                products += double(lengths[2 * i + list]) * heads * width;
            }
            windows[i] = (lengths[2 * i] + CHUNK - 1) / CHUNK;
            chunks[i + 1] = chunks[i] + windows[i] + (lengths[2 * i + 1] + CHUNK - 1) / CHUNK;
        }
        static thread_local Room shared_room;
        long slot_count = std::min(slots, chunks[n]);
        shared_room.open(n * (panels_size() * sizeof(X) + 64) + (n + slot_count) * Mixed::size(heads, width));
        X* panels = shared_room.take<X>(n * panels_size());
        std::vector<Mixed> states, parts;
        for (long i = 0; i < n; i++) states.push_back(Mixed::in(shared_room, heads, width));
        for (long s = 0; s < slot_count; s++) parts.push_back(Mixed::in(shared_room, heads, width));
#pragma omp parallel if (products > 10000)
        {
            static thread_local Room room;
            room.open(Work<X>::size(heads, width));
            Work<X> work(room, heads, width);
#pragma omp for schedule(static)
            for (long i = 0; i < n; i++) lay(i, panels + i * panels_size()), begin(states[i]);
            for (long round = 0; round < chunks[n]; round += slots) {
                long end = std::min(round + slots, chunks[n]);
#pragma omp for schedule(dynamic, 1)
                for (long c = round; c < end; c++) {
                    long i = std::upper_bound(chunks.begin(), chunks.end(), c) - chunks.begin() - 1, k = c - chunks[i];
                    int list = k >= windows[i];
                    long from = (list ? k - windows[i] : k) * CHUNK;
                    work.part = parts[c - round];
                    chunk(work, list, i, from, lengths[2 * i + list], panels + i * panels_size());
                }
#pragma omp for schedule(static) collapse(2)
                for (long i = 0; i < n; i++)
                    for (long h = 0; h < heads; h += 8)
                        for (long c = std::max(round, chunks[i]); c < std::min(end, chunks[i + 1]); c++)
                            add(states[i], parts[c - round], h, h + 8, width);
            }
#pragma omp for schedule(static)
            for (long i = 0; i < n; i++) finish(i, states[i]);
        }
    }

    void run() const {
        if (call.n < 4 * omp_get_max_threads()) few();
        else many(std::clamp<long>((1 << 18) / (heads * width), 1, 16));
    }
};

template <class T> void attend(const Call& call) {
#if defined(__AVX512BF16__)
    if (std::is_same<T, bf16>::value && call.D % 2 == 0 && call.pools[0].fits_bf16() && call.pools[1].fits_bf16())
        return Attention<T, bf16>{call}.run();
#endif
    Attention<T, float>{call}.run();
}

}  // namespace

// Queries q [n, H, D], both FP32 or BF16 as out; pools as in pool.h; intervals int64 [n], null for none; chosen [n, K].
EXPORT(sparse_attention)
(const void* q, int is_bf16, long n, long H, long D, const int64_t* window, const int64_t* entries, const void* start,
 const void* stop, const void* entry_start, const void* entry_stop, const void* chosen, long K, const float* sink,
 float scale, void* out, float* lse) {
    auto rows = [](const void* p) { return static_cast<const int64_t*>(p); };
    Call call{q, n, H, D, {Pool(window), Pool(entries)}, {rows(start), rows(entry_start)},
              {rows(stop), rows(entry_stop)}, rows(chosen), K, sink, scale, out, lse};
    if (is_bf16) attend<bf16>(call);
    else attend<float>(call);
}
