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
constexpr long PIECE = 16;  // rows of a chunk that a thread takes at a time where it is shared
constexpr long AHEAD = 8;   // rows by which memory is asked for before they are unpacked

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

// sum = sum + part, of all heads and the channels d0 <= d < d1, multiples of LANES.
void add(Mixed sum, Mixed part, long heads, long width, long d0, long d1) {
    for (long h = 0; h < heads; h += 8) {
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
            for (long d = d0; d < d1; d += LANES) store(mix + d, fused(load(mix + d), a, load(more + d) * b));
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

// What a thread works in. X: what scores are multiplied as, and what rows are read as.
template <class X> struct Work {
    const X* rows[CHUNK + KEYS];
    const uint8_t* found[CHUNK + SLACK];
    long picked[CHUNK];
    float *scores, *wide;  // wide: one row in FP32
    X* own;                // rows that do not lie in the pool as X
    Mixed part;

    static long size(long heads, long width) {
        long own = (CHUNK + SLACK) * width * sizeof(X);
        return Mixed::size(heads, width) + (CHUNK + KEYS) * heads * 4 + width * 4 + own + 3 * 64;
    }
    Work(Room& room, long heads, long width)
        : scores(room.take<float>((CHUNK + KEYS) * heads)), wide(room.take<float>(width)),
          own(room.take<X>((CHUNK + SLACK) * width)), part(Mixed::in(room, heads, width)) {}
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

    // The sink alone; of the mix the channels d0 <= d < d1, as everywhere.
    void begin(Mixed state, long d0, long d1) const {
        for (long h = 0; h < heads; h++) {
            state.top[h] = h < H ? call.sink[h] : 0.0f;
            state.total[h] = state.top[h] == -INFINITY ? 0.0f : 1.0f;
        }
        for (long h = 0; h < heads; h++) std::fill(state.mix + h * width + d0, state.mix + h * width + d1, 0.0f);
    }

    void finish(long i, Mixed state, long d0, long d1) const {
        for (long h = 0; h < H; h++) {
            float total = state.total[h], inverse = total == 0 ? 0.0f : 1 / total;
            T* out = static_cast<T*>(call.out) + (i * H + h) * D;
            const float* mix = state.mix + h * width;
            long d = d0;
            for (; d + LANES <= std::min(d1, D); d += LANES) store(out + d, load(mix + d) * inverse);
            if (d < std::min(d1, D)) store_some(out + d, load(mix + d) * inverse, int(D - d));
            if (!d0) call.lse[i * H + h] = state.top[h] + std::log(total);
        }
    }

    // Whether rows of a pool are read where they lie.
    bool in_place(const Pool& pool) const { return pool.kind == (std::is_same<X, float>::value ? F32 : BF16) && D == width; }

    // Rows `found` of a pool as X, into `own` where they do not lie so.
    void widen(Work<X>& work, const Pool& pool, long count, X* own) const {
        if (in_place(pool)) return;
        for (long r = 0; r < std::min(AHEAD, count); r++) pool.prefetch(work.found[r]);
        for (long r = 0; r < count; r++) {
            if (r + AHEAD < count) pool.prefetch(work.found[r + AHEAD]);
            if constexpr (std::is_same<X, float>::value) pool.widen_row(work.found[r], own + r * width, width);
            else pool.narrow_row(work.found[r], own + r * width, work.wide, width);
        }
    }

    // work.rows from the `count` of the rows found, from the one at `at`; own: as of `widen`.
    void use(Work<X>& work, const Pool& pool, long at, long count, const X* own) const {
        bool lie = in_place(pool);
        for (long r = 0; r < count; r++)
            work.rows[r] = lie ? reinterpret_cast<const X*>(work.found[at + r]) : own + (at + r) * width;
        for (long r = count; r < count + KEYS; r++) work.rows[r] = work.rows[count - 1];  // tiles are whole
    }

    // Products of a query with the first rows of work.
    void score(const Work<X>& work, const X* panels, long count, float* scores) const {
        for_panels(panels, heads, D, Score<X>{work.rows, count, D, heads, call.scale, scores});
    }

    // The mix of the rows of work by their scores.
    void mix(const Work<X>& work, long count, float* out, long d0, long d1) const {
        for (long d = d0; d < d1;) {
            bool both = d + MIX_WIDE * LANES <= d1;
            for (long h = 0; h < heads; h += MIX_HEADS) {
                float* to = out + h * width;
                if (both) mix_tile<MIX_WIDE>(work.scores + h, heads, work.rows, count, d, to, width);
                else mix_tile<1>(work.scores + h, heads, work.rows, count, d, to, width);
            }
            d += both ? MIX_WIDE * LANES : LANES;
        }
    }

    // Reduce `count` of the rows that were found and widened, from the one at `at`, for query panels.
    void reduce(Work<X>& work, const Pool& pool, const X* panels, long at, long count) const {
        use(work, pool, at, count, work.own);
        score(work, panels, count, work.scores);
        softmax(work, count);
        mix(work, count, work.part.mix, 0, width);
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
            widen(work, pool, hi - lo, work.own);
            for (long a = i; a < j; a++)
                if (long length = call.length(list, a); length > c) {
                    long at = call.first(list, a) + c - lo;
                    reduce(work, pool, panels + (a - i) * panels_size(), at, std::min(CHUNK, length - c));
                    add(states[a - i], work.part, heads, width, 0, width);
                }
        }
    }

    // A chunk of query i's chosen rows.
    void chosen(Work<X>& work, long i, long from, long length, const X* panels) const {
        long count = std::min(CHUNK, length - from);
        call.pick(i, from, work.picked);
        for (long r = 0; r < count; r++) work.found[r] = call.pools[1].at(work.picked[r]);
        widen(work, call.pools[1], count, work.own);
        reduce(work, call.pools[1], panels, 0, count);
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
                for (long a = i; a < j; a++) lay(a, panels + (a - i) * panels_size()), begin(states[a - i], 0, width);
                intervals(work, 0, i, j, panels, states.data());
                if (!call.chosen && call.start[1]) intervals(work, 1, i, j, panels, states.data());
                if (call.chosen)
                    for (long a = i; a < j; a++) {
                        long length = call.length(1, a);
                        for (long from = 0; from < length; from += CHUNK) {
                            chosen(work, a, from, length, panels + (a - i) * panels_size());
                            add(states[a - i], work.part, heads, width, 0, width);
                        }
                    }
                for (long a = i; a < j; a++) finish(a, states[a - i], 0, width);
            }
        }
    }

    // --- few queries: their chunks are shared out, some at a time, and added in order ---

    // Some rows of a query's list. One thread reduces them or, with a `place`, all threads: by rows, and then by channels.
    struct Chunk {
        long i;
        int list;
        long from, count, place;
    };
    // Rows of a chunk that is shared, or a whole one.
    struct Piece {
        const Chunk* of;
        long row, count;
    };
    // What threads make of a chunk that they share.
    struct Shared {
        X* rows;
        float* scores;
        static long size(long heads, long width) { return CHUNK * width * sizeof(X) + (CHUNK + KEYS) * heads * 4 + 2 * 64; }
    };
    // The chunks, in rounds of `slots` of them.
    struct Cut {
        long slots, most = 0;      // most: chunks that are shared in a round
        std::vector<long> chosen;  // of each query the chosen rows that are there, from i * K on
        std::vector<Chunk> chunks;
        std::vector<Piece> pieces;  // of a round the whole chunks first
        std::vector<size_t> first;  // piece of each round

        // share: not only chunks. Each thread has as many whole ones as the others.
        Cut(const Call& call, long threads, bool share) : slots(4 * threads), chosen(call.chosen ? call.n * call.K : 0) {
            for (long i = 0; i < call.n; i++)
                for (int list = 0; list < 2; list++) {
                    long length = 0;
                    if (!list || !call.chosen) length = call.length(list, i);
                    else
                        for (long k = 0; k < call.K; k++)
                            if (long row = call.chosen[i * call.K + k]; call.there(row)) chosen[i * call.K + length++] = row;
                    for (long c = 0; c < length; c += CHUNK) chunks.push_back({i, list, c, std::min(CHUNK, length - c), -1});
                }
            for (long round = 0; round < long(chunks.size()); round += slots) {
                long whole = 0, places = 0;
                for (long c = round; c < end(round); c++) whole += chunks[c].count == CHUNK;
                whole = whole / threads * threads;
                for (long c = round; share && c < end(round); c++)
                    if (chunks[c].count < CHUNK || whole-- <= 0) chunks[c].place = places++;
                most = std::max(most, places);
                first.push_back(pieces.size());
                for (long c = round; c < end(round); c++)
                    if (chunks[c].place < 0) pieces.push_back({&chunks[c], 0, chunks[c].count});
                for (long c = round; c < end(round); c++)
                    for (long row = 0; chunks[c].place >= 0 && row < chunks[c].count; row += PIECE)
                        pieces.push_back({&chunks[c], row, std::min(PIECE, chunks[c].count - row)});
            }
            first.push_back(pieces.size());
        }
        long end(long round) const { return std::min<long>(round + slots, chunks.size()); }
    };

    // Sets work.found to where rows of a chunk lie.
    void find(Work<X>& work, const Cut& cut, const Chunk& chunk, long row, long count) const {
        const Pool& pool = call.pools[chunk.list];
        const long from = chunk.from + row;
        if (!chunk.list || !call.chosen) return pool.addresses(call.first(chunk.list, chunk.i) + from, count, work.found);
        for (long r = 0; r < count; r++) work.found[r] = pool.at(cut.chosen[chunk.i * call.K + from + r]);
    }

    // Scores of a piece; a whole chunk's reduction, into `part`.
    void take(Work<X>& work, const Cut& cut, Piece piece, const X* panels, Mixed part, const Shared* shared) const {
        const Chunk& chunk = *piece.of;
        const Pool& pool = call.pools[chunk.list];
        find(work, cut, chunk, piece.row, piece.count);
        X* to = shared ? shared->rows + piece.row * width : work.own;
        widen(work, pool, piece.count, to);
        use(work, pool, 0, piece.count, to);
        score(work, panels, piece.count, shared ? shared->scores + piece.row * heads : work.scores);
        if (shared) return;
        work.part = part;
        softmax(work, piece.count);
        mix(work, piece.count, part.mix, 0, width);
    }

    // The reduction of a chunk whose scores are there, but the mix of some channels alone, into part.mix.
    Mixed reduce_shared(Work<X>& work, const Cut& cut, const Chunk& chunk, const Shared& shared, Mixed part, long d0,
                        long d1) const {
        find(work, cut, chunk, 0, chunk.count);
        use(work, call.pools[chunk.list], 0, chunk.count, shared.rows);
        std::memcpy(work.scores, shared.scores, chunk.count * heads * sizeof(float));
        work.part.mix = part.mix;
        softmax(work, chunk.count);
        mix(work, chunk.count, part.mix, d0, d1);
        return work.part;
    }

    void few() const {
        long threads = omp_get_max_threads(), n = call.n, rows = 0;
        const bool share = n < threads;  // queries
        const Cut cut(call, threads, share);
        const long count = cut.chunks.size(), slot_count = std::min(cut.slots, count);
        for (const Chunk& chunk : cut.chunks) rows += chunk.count;
        static thread_local Room shared_room;
        shared_room.open(n * (panels_size() * sizeof(X) + 64) + (n + slot_count) * Mixed::size(heads, width) +
                         cut.most * Shared::size(heads, width));
        X* panels = shared_room.take<X>(n * panels_size());
        std::vector<Mixed> states, parts;
        std::vector<Shared> shared;
        for (long i = 0; i < n; i++) states.push_back(Mixed::in(shared_room, heads, width));
        for (long s = 0; s < slot_count; s++) parts.push_back(Mixed::in(shared_room, heads, width));
        for (long s = 0; s < cut.most; s++)
            shared.push_back({shared_room.take<X>(CHUNK * width), shared_room.take<float>((CHUNK + KEYS) * heads)});
#pragma omp parallel if (double(rows) * heads * width > 10000)
        {
            // what is added up here: some channels of all queries, or some queries
            const long t = omp_get_thread_num(), team = omp_get_num_threads(), vectors = width / LANES;
            const long d0 = share ? vectors * t / team * LANES : 0, d1 = share ? vectors * (t + 1) / team * LANES : width;
            const long first = share ? 0 : n * t / team, last = d0 == d1 ? 0 : share ? n : n * (t + 1) / team;
            static thread_local Room room;
            room.open(Work<X>::size(heads, width) + (n + 1) * Mixed::size(heads, 0));
            Work<X> work(room, heads, width);
            const Mixed own = Mixed::in(room, heads, 0);
            std::vector<Mixed> sums;  // each thread has its own largest scores and totals
            for (long i = 0; i < n; i++) sums.push_back(Mixed::in(room, heads, 0)), sums[i].mix = states[i].mix;
            for (long i = first; i < last; i++) begin(sums[i], d0, d1);
#pragma omp for schedule(static)
            for (long i = 0; i < n; i++) lay(i, panels + i * panels_size());
            for (long round = 0; round < count; round += cut.slots) {
                const size_t* pieces = &cut.first[round / cut.slots];
#pragma omp for schedule(dynamic, 1)
                for (size_t p = pieces[0]; p < pieces[1]; p++) {
                    const Chunk& chunk = *cut.pieces[p].of;
                    take(work, cut, cut.pieces[p], panels + chunk.i * panels_size(), parts[&chunk - &cut.chunks[round]],
                         chunk.place < 0 ? nullptr : &shared[chunk.place]);
                }
                work.part = own;
                for (long c = round; c < cut.end(round); c++) {
                    const Chunk& chunk = cut.chunks[c];
                    if (chunk.i < first || chunk.i >= last) continue;
                    Mixed part = parts[c - round];
                    if (chunk.place >= 0) part = reduce_shared(work, cut, chunk, shared[chunk.place], part, d0, d1);
                    add(sums[chunk.i], part, heads, width, d0, d1);
                }
                if (round + cut.slots < count) {  // parts are written again
#pragma omp barrier
                }
            }
            for (long i = first; i < last; i++) finish(i, sums[i], d0, d1);
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
