// What several kernels do to a row of numbers: RMSNorm and rotation.
#pragma once

#include "simd.h"

namespace {

// `load` and `store` for BF16 in the one instruction that AVX-512 has; the compiler makes several of the plain forms.
INLINE vf load_whole(const float* p) { return load(p); }
INLINE void store_whole(float* p, vf v) { store(p, v); }
INLINE vf load_whole(const bf16* p) {
#if defined(__AVX512F__)
    return as_float((vu)_mm512_cvtepu16_epi32(load_as<__m256i>(p)) << 16);
#else
    return load(p);
#endif
}
INLINE void store_whole(bf16* p, vf v) {
#if defined(__AVX512BF16__)
    constexpr int SUBNORMAL = 0x20;  // which the instruction takes for zero
    if (__builtin_expect(!_mm512_fpclass_ps_mask((__m512)v, SUBNORMAL), 1)) {
        __m256bh out = _mm512_cvtneps_pbh((__m512)v);
        std::memcpy(p, &out, sizeof out);
        return;
    }
#endif
    store(p, v);
}

// One vector of a row, of `count` numbers where the row ends before the vector does.
template <class T> INLINE vf load_up_to(const T* p, long count) {
    return count >= LANES ? load_whole(p) : load_some(p, int(count));
}
template <class T> INLINE void store_up_to(T* p, vf v, long count) {
    if (count >= LANES) store_whole(p, v);
    else store_some(p, v, int(count));
}

// The sum of a row's squares in FP32; a `copy` of the row is written where one is wanted, of whole vectors.
template <class T> INLINE float sum_of_squares(const T* row, long width, float* copy = nullptr) {
    vf squares[4] = {};  // the sums of one would wait for each other
    auto add = [&](vf x, long i, vf& to) {
        to = to + x * x;
        if (copy) store(copy + i, x);
    };
    long i = 0;
    for (; i + 4 * LANES <= width; i += 4 * LANES)
        for (int a = 0; a < 4; a++) add(load_whole(row + i + a * LANES), i + a * LANES, squares[a]);
    for (; i < width; i += LANES) add(load_up_to(row + i, width - i), i, squares[0]);
    return sum((squares[0] + squares[1]) + (squares[2] + squares[3]));
}

// The row in place becomes x / rms(x) * gain, in FP32, cast once; without a gain it is 1.
template <class T> INLINE void rms_norm(T* row, long width, const float* gain, float eps) {
    float rho = 1.0f / std::sqrt(sum_of_squares(row, width) / float(width) + eps);
    for (long i = 0; i < width; i += LANES) {
        vf x = load_up_to(row + i, width - i) * rho;
        if (gain) x = x * load_up_to(gain + i, width - i);
        store_up_to(row + i, x, width - i);
    }
}

// Numbers 2i and 2i + 1 of `from` times turn_i (or its conjugate, where sign is -1), of 2 * pairs numbers; cast once.
template <class T> INLINE void turn_pairs(const T* from, T* to, const float* turn, long pairs, float sign) {
    vi even, odd, other;
    vf signs;
    for (int i = 0; i < LANES; i++) {
        even[i] = i & ~1;
        odd[i] = i | 1;
        other[i] = i ^ 1;
        signs[i] = i & 1 ? sign : -sign;
    }
    for (long i = 0; i < 2 * pairs; i += LANES) {
        long left = 2 * pairs - i;
        vf x = load_up_to(from + i, left), t = load_up_to(turn + i, left);
        vf y = x * __builtin_shuffle(t, even) + __builtin_shuffle(x, other) * (__builtin_shuffle(t, odd) * signs);
        store_up_to(to + i, y, left);
    }
}

}  // namespace
