// Rows of a pool, read where they lie: numbers or packed bytes (ops/formats.py), one after the other or in pages.
#pragma once

#include "matmul.h"
#include "room.h"

namespace {

// Numbers that BF16 holds exactly, as BF16.
INLINE void as_bf16(const float* row, bf16* out, long padded) {
    for (long k = 0; k < padded; k += LANES) {
        vh top = to_halves(as_bits(load(row + k)) >> 16);
        std::memcpy(out + k, &top, sizeof top);
    }
}

struct Pool {
    const uint8_t* data;
    const int64_t* table;           // the pages' numbers, or null where rows lie one after the other
    long rows, per_page, stride;    // stride: bytes from row to row of `data`
    long kind, coded, tail, block;  // kind: a Dtype; numbers in codes, in the BF16 tail, in a block of a scale
    bool fp32_scales;               // else UE8M0

    // As pools.py lays it out.
    explicit Pool(const int64_t* p)
        : data(reinterpret_cast<const uint8_t*>(p[0])), table(reinterpret_cast<const int64_t*>(p[1])), rows(p[2]),
          per_page(p[3]), stride(p[4]), kind(p[5]), coded(p[6]), tail(p[7]), block(p[8]), fp32_scales(p[9]) {}

    // Whether BF16 holds all its numbers exactly.
    bool fits_bf16() const { return kind != F32 && !fp32_scales; }

    INLINE const uint8_t* at(long row) const {
        return data + (table ? table[row / per_page] * per_page + row % per_page : row) * stride;
    }

    // Where the rows from..from+count-1 lie.
    void addresses(long from, long count, const uint8_t** out) const {
        if (table && per_page == 1) {
            for (long i = 0; i < count; i++) out[i] = data + table[from + i] * stride;
            return;
        }
        for (long i = 0; i < count;) {
            long left = table ? std::min(count - i, per_page - (from + i) % per_page) : count;
            const uint8_t* row = at(from + i);
            for (long end = i + left; i < end; i++, row += stride) out[i] = row;
        }
    }

    // The numbers of a row in FP32, and zeros up to `padded`, a multiple of LANES.
    INLINE void widen_row(const uint8_t* row, float* out, long padded) const {
        switch (kind) {
            case F32: return plain(reinterpret_cast<const float*>(row), out, padded);
            case BF16: return plain(reinterpret_cast<const bf16*>(row), out, padded);
            case FP8: return packed<FP8>(row, out, padded);
            default: return packed<FP4>(row, out, padded);
        }
    }

    // The same in BF16, of rows that BF16 holds exactly (`fits_bf16`); `wide` has room for a row.
    INLINE void narrow_row(const uint8_t* row, bf16* out, float* wide, long padded) const {
#if defined(__AVX512BF16__)
        if (kind == FP4 && tail == 0 && coded % 32 == 0 && block == 32) {
            Fp4Row codes{row, row + coded / 2};
            long k = 0;
            for (__m512i some; k < coded && narrow_codes(codes, k, some); k += 32) std::memcpy(out + k, &some, sizeof some);
            if (k >= coded) {
                for (; k < padded; k++) out[k] = 0;
                return;
            }
        }
        if (kind == FP8 && coded % 32 == 0 && block % 32 == 0 && narrow_fp8(row, out, padded)) return;
#endif
        if (kind == BF16) {
            std::memcpy(out, row, (coded + tail) * sizeof(bf16));
            for (long k = coded + tail; k < padded; k++) out[k] = 0;
            return;
        }
        widen_row(row, wide, padded);
        as_bf16(wide, out, padded);
    }

    // A row that will be read soon.
    INLINE void prefetch(const uint8_t* row) const {
        long bytes = std::min(stride, 4 * (coded + tail));  // rows of a wider matrix may lie far apart
        for (long b = 0; b < bytes; b += 64) __builtin_prefetch(row + b);
    }

  private:
    template <class T> INLINE void plain(const T* row, float* out, long padded) const {
        long k = 0;
        for (; k + LANES <= coded; k += LANES) store(out + k, load(row + k));
        if (k < coded) store(out + k, load_some(row + k, int(coded - k))), k += LANES;
        for (; k < padded; k += LANES) store(out + k, vf{});
    }

#if defined(__AVX512BF16__)
    // False where a scale or a NaN asks for FP32.
    INLINE bool narrow_fp8(const uint8_t* row, bf16* out, long padded) const {
        const uint8_t* scales = row + coded + 2 * tail;
        __mmask32 nan = 0;
        for (long first = 0; first < coded; first += block) {
            const Fp8Codes codes(scales[first / block]);
            if (!codes.fits) return false;
            for (long k = first, last = std::min(first + block, coded); k < last; k += 32) {
                const __m512i some = codes.numbers(row + k);
                std::memcpy(out + k, &some, sizeof some);
                nan |= Fp8Codes::nans(row + k);
            }
        }
        std::memcpy(out + coded, row + coded, 2 * tail);
        for (long k = coded + tail; k < padded; k++) out[k] = 0;
        return !nan;
    }
#endif

    // [codes | tail in BF16 | scales, UE8M0 or FP32]
    template <int K> INLINE void packed(const uint8_t* row, float* out, long padded) const {
        long bytes = K == FP8 ? coded : (coded + 1) / 2;
        const uint8_t* scales = row + bytes + 2 * tail;
        for (long first = 0; first < coded; first += block) {
            float scale;
            if (fp32_scales) {
                std::memcpy(&scale, scales, 4), scales += 4;
            } else {
                uint32_t bits = uint32_t(*scales++) << 23;
                std::memcpy(&scale, &bits, 4);
            }
            long last = std::min(first + block, coded), k = first;  // a block is a multiple of LANES (LIMITS)
            for (; k + LANES <= last; k += LANES) store(out + k, codes<K>(row, k, scale));
            if (k < last) {  // the row's end: what is read must not be beyond it
                uint8_t part[LANES] = {};
                std::memcpy(part, row + (K == FP8 ? k : k / 2), bytes - (K == FP8 ? k : k / 2));
                store_some(out + k, codes<K>(part, 0, scale), int(last - k));
            }
        }
        if (K == FP8) keep_nan(row, out);
        const uint8_t* from = row + bytes;
        long k = coded, width = coded + tail;
        for (; k + LANES <= width; k += LANES)
            store(out + k, load(reinterpret_cast<const bf16*>(from + 2 * (k - coded))));
        if (k < width) {
            bf16 part[LANES] = {};
            std::memcpy(part, from + 2 * (k - coded), 2 * (width - k));
            store_some(out + k, load(part), int(width - k));
        }
        for (k = width; k < padded; k++) out[k] = 0;
    }

    // A row of finite numbers has no such code (ops.pack_rows): so it is looked for once, and seldom there.
    INLINE void keep_nan(const uint8_t* row, float* out) const {
        vb found = {};
        long k = 0;
        for (; k + LANES <= coded; k += LANES) found |= (vb)((load_as<vb>(row + k) & 0x7f) == 0x7f);
        uint64_t any[LANES / 8], some = 0;
        std::memcpy(any, &found, LANES);
        for (uint64_t bytes : any) some |= bytes;
        for (; k < coded; k++) some |= (row[k] & 0x7f) == 0x7f;
        if (!some) return;
        for (k = 0; k < coded; k++)
            if ((row[k] & 0x7f) == 0x7f) out[k] = NAN;
    }

    // LANES numbers of a packed row, but for the two FP8 codes that are NaN
    template <int K> static INLINE vf codes(const uint8_t* p, long k, float scale) {
        return K == FP8 ? Fp8Row::scaled(p + k, scale) : Fp4Row{nullptr, nullptr}.numbers(p + k / 2) * scale;
    }
};

}  // namespace
