// The best k rows by score, ties to the lowest row, from scores that come in ascending order of rows.
#pragma once

#include "simd.h"

namespace {

// Unsigned numbers that sort like scores: 0.0 and -0.0 alike, NaN above all.
INLINE vu ordered(vf score) {
    vu bits = as_bits(score + 0.0f);
    vu order = bits ^ ((vu)((vi)bits >> 31) | 0x80000000u);
    return score != score ? ~vu{} : order;
}
INLINE float score_of(uint32_t order) {
    uint32_t bits = order == ~0u ? 0x7fc00000u : order & 0x80000000u ? order ^ 0x80000000u : ~order;
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
}

// Candidates in ascending order of rows, among which are the best k so far. Once there are k, a score must be above the
// least of them: equal ones come later, so they lose. -inf is no candidate.
struct Best {
    uint32_t* order;
    int32_t* rows;
    long k, room, count;
    float least;

    static long room_for(long k) { return 2 * k + 16 * LANES; }

    void clear(long wanted) { k = wanted, count = 0, least = wanted ? -INFINITY : NAN; }

    // `found` scores, of the rows from `row` on; all of the last vector may be read.
    void offer(const float* scores, long row, long found) {
        if (!k) return;
        for (long i = 0; i < found; i += LANES) {
            vf score = load(scores + i);
            uint32_t mask = above(score) & (found - i < LANES ? (1u << (found - i)) - 1 : ~0u);
            if (!mask) continue;
            if (count + LANES > room) {
                cut();
                mask &= above(score);
            }
            uint32_t part[LANES];
            vu all = ordered(score);
            std::memcpy(part, &all, sizeof part);
            for (; mask; mask &= mask - 1, count++) {
                int lane = __builtin_ctz(mask);
                order[count] = part[lane], rows[count] = int32_t(row + i + lane);
            }
        }
    }

    // Take over the candidates of rows that come after all of these.
    void offer(const Best& later) {
        for (long i = 0; i < later.count; i++, count++) {
            if (count == room) cut();
            order[count] = later.order[i], rows[count] = later.rows[i];
        }
    }

    // Forget all but the best k.
    void cut() {
        if (count <= k) return;
        uint32_t border = kth();
        long ties = k - at_least(border + 1ull), kept = 0;
        for (long i = 0; i < count; i++) {
            uint32_t score = order[i];
            bool keep = score > border || (score == border && ties > 0);
            ties -= score == border;
            order[kept] = score, rows[kept] = rows[i];
            kept += keep;
        }
        count = kept, least = score_of(border);
    }

    // The rows in ascending order, -1 first where there are fewer than `width`.
    void finish(int64_t* out, long width) {
        cut();
        std::fill(out, out + width - count, -1);
        std::copy(rows, rows + count, out + width - count);
    }

  private:
    INLINE uint32_t above(vf score) const {  // NaN is above all
#if defined(__AVX512F__)
        return _mm512_cmp_ps_mask((__m512)score, _mm512_set1_ps(least), _CMP_NLE_UQ);
#else
        return _mm256_movemask_ps(_mm256_cmp_ps((__m256)score, _mm256_set1_ps(least), _CMP_NLE_UQ));
#endif
    }

    long at_least(uint64_t border) const {
        if (border > ~0u) return 0;
        vi counts = {};
        long i = 0, total = 0;
        vu than = vu{} + uint32_t(border);
        for (; i + LANES <= count; i += LANES) counts -= (vi)(load_as<vu>(order + i) >= than);
        for (int lane = 0; lane < LANES; lane++) total += counts[lane];
        for (; i < count; i++) total += order[i] >= border;
        return total;
    }

    // The k-th largest of `order`, from its highest bit to its lowest: the bits that all share are not tried.
    uint32_t kth() const {
        vu low = ~vu{}, high = {};
        long i = 0;
        for (; i + LANES <= count; i += LANES) {
            vu some = load_as<vu>(order + i);
            low = some < low ? some : low, high = some > high ? some : high;
        }
        uint32_t least_of = ~0u, most = 0;
        for (int lane = 0; lane < LANES; lane++) least_of = std::min(least_of, low[lane]), most = std::max(most, high[lane]);
        for (; i < count; i++) least_of = std::min(least_of, order[i]), most = std::max(most, order[i]);
        if (least_of == most) return most;
        int bit = 31 - __builtin_clz(least_of ^ most);
        uint32_t border = bit == 31 ? 0 : most >> (bit + 1) << (bit + 1);
        for (; bit >= 0; bit--)
            if (uint32_t trial = border | 1u << bit; at_least(trial) >= k) border = trial;
        return border;
    }
};

}  // namespace
