// What several kernels do to a row of numbers: RMSNorm.
#pragma once

#include "simd.h"

namespace {

// One vector of a row from i on, of `count` numbers where the row ends before the vector does.
template <class T> INLINE vf load_up_to(const T* p, long count) {
    return count >= LANES ? load(p) : load_some(p, int(count));
}
template <class T> INLINE void store_up_to(T* p, vf v, long count) {
    if (count >= LANES) store(p, v);
    else store_some(p, v, int(count));
}

// The row in place becomes x / rms(x) * gain, in FP32, cast once.
template <class T> INLINE void rms_norm(T* row, long width, const float* gain, float eps) {
    vf squares = {};
    for (long i = 0; i < width; i += LANES) {
        vf x = load_up_to(row + i, width - i);
        squares = squares + x * x;
    }
    float rho = 1.0f / std::sqrt(sum(squares) / float(width) + eps);
    for (long i = 0; i < width; i += LANES) {
        vf x = load_up_to(row + i, width - i) * rho * load_up_to(gain + i, width - i);
        store_up_to(row + i, x, width - i);
    }
}

}  // namespace
