// What a step is to all layers, planned once (plan.cpp) and read by every block (block.cpp); laid out as in block.py, every
// field of eight bytes. All rows and positions are int64; what each array is, model/parts.py says.
#pragma once

#include <cstdint>
#include <cstring>

namespace {

constexpr int KINDS = 2;  // of layers with compressed entries

struct RingRows {
    int64_t *read, *order, *write, *kept;  // order, kept: null where rows are in order, where all are kept
    long before, joined, stored;
    int64_t* places;  // of the joined rows, once those are stored; null where some would have been written over

    // The rows of a ring before the step's own ones, and its own, in order: `joined` of them.
    void join(const uint8_t* ring, const uint8_t* own, long bytes, uint8_t* out) const {
        for (long i = 0; i < joined; i++) {
            long from = order ? order[i] : i;
            std::memcpy(out + i * bytes, from < before ? ring + read[from] * bytes : own + (from - before) * bytes, bytes);
        }
    }
    void store(uint8_t* ring, const uint8_t* own, long bytes) const {
        for (long i = 0; i < stored; i++) std::memcpy(ring + write[i] * bytes, own + (kept ? kept[i] : i) * bytes, bytes);
    }
};

struct Groups {
    long closing, longest;  // groups that close; entries that a token sees, at most
    int64_t *first_row, *entry, *start, *stop;
    uint8_t* has_previous;
    RingRows rows;
};

struct Step {
    long n, pages;
    int64_t *positions;  // [n], then that of the first token of every group that closes, by kind: they all rotate
    int64_t *start, *stop;
    const int64_t* table;
    const float *window_turn, *turn;  // [positions, pairs, 2]: rotations, of layers with a window alone and of all others
    RingRows ring;
    Groups groups[KINDS];
};

}  // namespace
