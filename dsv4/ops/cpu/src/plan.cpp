// Where the tokens of a step read and write: what model/parts.py plans for a part of a run whose sequences all continue
// memories of one pool, for few tokens, in a few microseconds.
#include "simd.h"
#include "step.h"

namespace {

struct Sequences {
    long count;
    const int64_t *slot, *start, *length;
};

// Hands out pieces of the caller's room.
struct Pieces {
    int64_t* at;
    int64_t* operator()(long count) { return at += count, at - count; }
};

// A ring of `size` rows a slot: before[i] rows of sequence i precede its own, of which own[i] are joined to them. in_place:
// they are read where they lie, if all of them do so at once.
RingRows ring_rows(const Sequences& s, long size, const int64_t* before, const int64_t* own, Pieces& take,
                   bool in_place = false) {
    RingRows out{};
    long longest = 0, total = 0;
    for (long i = 0; i < s.count; i++) {
        out.before += before[i], out.joined += before[i] + own[i], total += s.length[i];
        longest = std::max<long>(longest, s.length[i]);
    }
    out.read = take(out.before);
    out.write = take(total);
    if (s.count > 1) out.order = take(out.joined);
    if (longest > size) out.kept = take(total);
    // a row that is written takes the place of one so far back that nobody reads it
    for (long i = 0; i < s.count; i++) in_place &= before[i] + own[i] <= size;
    if (in_place) out.places = take(out.joined);
    int64_t *read = out.read, *place = out.places;
    for (long i = 0; in_place && i < s.count; i++)
        for (long j = -before[i]; j < own[i]; j++) *place++ = s.slot[i] * size + (s.start[i] + j) % size;
    for (long i = 0, at = 0, first = 0; i < s.count; first += s.length[i], i++) {
        for (long j = 0; out.order && j < before[i]; j++) out.order[at++] = read - out.read + j;
        for (long j = 0; out.order && j < own[i]; j++) out.order[at++] = out.before + first + j;
        for (long j = 0; j < before[i]; j++) *read++ = s.slot[i] * size + (s.start[i] - before[i] + j) % size;
        for (long j = std::max<long>(0, s.length[i] - size); j < s.length[i]; j++) {  // what would be written over is not
            if (out.kept) out.kept[out.stored] = first + j;
            out.write[out.stored++] = s.slot[i] * size + (s.start[i] + j) % size;
        }
    }
    return out;
}

}  // namespace

// count sequences: slot, start (its length so far), length (new tokens) int64 [count], and the tables of their pages.
// window: rows that a token sees, itself among them. kinds: ratio and overlap of each of `num_kinds`. turns, turned_from [count]:
// for each sequence rotations FP32 [.., 2, pairs, 2] of a window's layers and of others, and of which position the first is.
// `room` is for all arrays of `step`, which is valid as long as it and the tables are.
EXPORT(plan)
(long count, const int64_t* slot, const int64_t* start, const int64_t* length, const int64_t* const* tables, long window,
 long max_rewind, long page_tokens, long num_kinds, const int64_t* kinds, const float* const* turns, const int64_t* turned_from,
 long pairs, int64_t* room, Step* step) {
    Sequences s{count, slot, start, length};
    Pieces take{room};
    Step& out = *step;
    out = Step{};
    long held = 0;
    for (long i = 0; i < count; i++) out.n += length[i];
    int64_t *before = take(count), *own = take(count), *page = take(count);  // page: the first of each sequence
    for (long i = 0; i < count; i++) page[i] = held, held += (start[i] + length[i] + page_tokens - 1) / page_tokens;
    if (num_kinds) out.pages = held;
    if (count == 1) out.table = tables[0];
    else if (num_kinds) {
        int64_t* table = take(held);
        out.table = table;
        for (long i = 0; i < count; i++) {
            long pages = (i + 1 < count ? page[i + 1] : held) - page[i];
            std::memcpy(table + page[i], tables[i], pages * sizeof(int64_t));
        }
    }

    out.start = take(out.n), out.stop = take(out.n);
    long token = 0, base = 0;
    for (long i = 0; i < count; i++) {
        before[i] = std::min<int64_t>(start[i], window - 1), own[i] = length[i];
        for (long j = 0; j < length[i]; j++, token++) {
            long row = base + before[i] + j;
            out.start[token] = std::max(row - (window - 1), base), out.stop[token] = row + 1;
        }
        base += before[i] + own[i];
    }
    out.ring = ring_rows(s, window + max_rewind, before, own, take, true);

    for (long k = 0; k < num_kinds; k++) {
        Groups& g = out.groups[k];
        long r = kinds[2 * k], overlap = kinds[2 * k + 1], per_page = page_tokens / r;
        for (long i = 0; i < count; i++) {
            long closing = (start[i] + length[i]) / r - start[i] / r;
            g.closing += closing;
            before[i] = closing ? start[i] % r + (overlap && start[i] >= r ? r : 0) : 0;
            own[i] = closing ? length[i] : 0;
        }
        g.start = take(out.n), g.stop = take(out.n), g.first_row = take(g.closing), g.entry = take(g.closing);
        g.has_previous = reinterpret_cast<uint8_t*>(take((g.closing + 7) / 8));
        long group = 0, joined = 0;
        token = 0;
        for (long i = 0; i < count; i++) {
            for (long j = 0; j < length[i]; j++, token++) {
                long seen = (start[i] + j + 1) / r;
                g.start[token] = page[i] * per_page, g.stop[token] = g.start[token] + seen;
                g.longest = std::max(g.longest, seen);
            }
            for (long e = start[i] / r; e < (start[i] + length[i]) / r; e++, group++) {
                g.first_row[group] = e * r - start[i] + joined + before[i];
                g.entry[group] = out.table[page[i] + e / per_page] * per_page + e % per_page;
                g.has_previous[group] = e > 0;
            }
            joined += before[i] + own[i];
        }
        g.rows = ring_rows(s, r * (overlap ? 2 : 1) + max_rewind, before, own, take);
    }

    long closing = 0;
    for (long k = 0; k < num_kinds; k++) closing += out.groups[k].closing;
    int64_t* position = out.positions = take(out.n + closing);
    float *window_turn = reinterpret_cast<float*>(take((out.n + closing) * pairs)),
          *turn = reinterpret_cast<float*>(take((out.n + closing) * pairs));
    out.window_turn = window_turn, out.turn = turn;
    auto add = [&](long sequence, int64_t at) {
        const float* from = turns[sequence] + (at - turned_from[sequence]) * 4 * pairs;
        *position++ = at;
        window_turn = std::copy_n(from, 2 * pairs, window_turn), turn = std::copy_n(from + 2 * pairs, 2 * pairs, turn);
    };
    for (long i = 0; i < count; i++)
        for (long j = 0; j < length[i]; j++) add(i, start[i] + j);
    for (long k = 0; k < num_kinds; k++)
        for (long i = 0; i < count; i++)
            for (long e = start[i] / kinds[2 * k]; e < (start[i] + length[i]) / kinds[2 * k]; e++) add(i, e * kinds[2 * k]);
}
