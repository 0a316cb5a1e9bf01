// Matrices as what strips.h multiplies: rows of units, and strips of these, from matrices that lie one way or the other. T are the
// numbers in memory, FP32 or BF16; X what they are multiplied as (matmul.h: BF16 as it is where the machine can, else FP32).
#pragma once

#include "matmul.h"
#include "norm.h"
#include "strips.h"

namespace {

// Numbers of a row in whole units.
template <class X> INLINE long whole(long numbers) { return units<X>(numbers) * Unit<X>::STEP; }

// Zeros after the numbers of each row of a block, and in rows up to a whole tile.
template <class X> void fill_up(X* rows, long width, long count) {
    const long stride = whole<X>(width);
    for (long i = 0; stride > width && i < count; i++) rows[i * stride + width] = 0;
    std::fill(rows + count * stride, rows + up(count, ROWS) * stride, X(0));
}

template <class T> using As = typename Multiplied<T>::type;

// Numbers as T, and then as what is multiplied.
template <class T, class S> INLINE void convert(const S* from, long count, As<T>* to) {
    typedef As<T> X;
    if constexpr (std::is_same<S, X>::value && std::is_same<T, X>::value) std::memcpy(to, from, count * sizeof(X));
    else
        for (long i = 0; i < count; i += LANES) {
            const vf v = load_up_to(from + i, count - i);
#if defined(__AVX512BF16__)
            const vh part = Unit<bf16>::rounded(v);
            std::memcpy(to + i, &part, std::min<long>(LANES, count - i) * sizeof(bf16));
#else
            store_up_to(to + i, std::is_same<S, float>::value ? as_bf16(v) : v, count - i);
#endif
        }
}
// The same of what was computed in place.
template <class T> INLINE void round_to(As<T>* numbers, long count) {
    if constexpr (!std::is_same<T, As<T>>::value) convert<T>(numbers, count, numbers);
}

#if defined(__AVX512BF16__)
// The bits of BF16 numbers, a lane each.
INLINE vu bits16(const bf16* p, long count) { return as_bits(load_up_to(p, count)) >> 16; }
INLINE vu bits16(const float* p, long count) { return widen(Unit<bf16>::rounded(load_up_to(p, count))); }
#endif

// A matrix [K, columns], `ld` numbers from row to row, in units, with zeros after them up to `ldo` of a row: a unit of BF16 has
// the numbers of two rows.
template <class T, class S> void in_units(const S* from, long ld, long K, long columns, float* to, long ldo) {
    typedef As<T> X;
    for (long q = 0; q < units<X>(K); q++, to += ldo) {
        if constexpr (std::is_same<X, float>::value) {
            convert<T>(from + q * ld, columns, to);
            std::fill(to + columns, to + ldo, 0.0f);
        } else {
            const S* first = from + 2 * q * ld;
            const bool both = 2 * q + 1 < K;
            for (long c = 0; c < ldo; c += LANES) {
                long left = std::clamp<long>(columns - c, 0, LANES);
                vu unit = bits16(first + c, left);
                if (both) unit |= bits16(first + ld + c, left) << 16;
                store_up_to(to + c, as_float(unit), ldo - c);
            }
        }
    }
}

// Strips of w [K, columns].
template <class T, class W> struct Plain {
    const W* w;
    long ld, K;
    void operator()(long j, long there, float* to) const { in_units<T>(w + j, ld, K, there, to, WIDE); }
};
// Strips of the turned w [columns, K]; room: for WIDE rows of it in whole units.
template <class T, class W> struct Turned {
    typedef As<T> X;
    const W* w;
    long ld, K;
    X* room;
    void operator()(long j, long there, float* to) const {
        const W* from = w + j * ld;
        if (there < WIDE) std::fill(to, to + units<X>(K) * WIDE, 0.0f);
        if constexpr (std::is_same<T, float>::value) turn(from, ld, there, K, to, WIDE);
        else {
            const long stride = whole<X>(K);
            for (long i = 0; i < there; i++) {
                convert<T>(from + i * ld, K, room + i * stride);
                if (stride > K) room[i * stride + K] = 0;
            }
            turn(reinterpret_cast<const float*>(room), units<X>(K), there, units<X>(K), to, WIDE);
        }
    }
};

// to [columns, K] in whole units = from [K, columns] turned; room: for as much.
template <class T, class S> void turn_rows(const S* from, long ld, long K, long columns, float* room, As<T>* to) {
    typedef As<T> X;
    float* out = reinterpret_cast<float*>(to);
    if constexpr (std::is_same<T, float>::value) turn(from, ld, K, columns, out, K);
    else {
        in_units<T>(from, ld, K, columns, room, columns);
        turn(room, columns, units<X>(K), columns, out, units<X>(K));
    }
}

// A product by strips, into out [rows, columns]: added to it where `add`. x [rows, K] in whole units, its rows whole tiles;
// pack(j, columns, to): the strip from column j on of what it is multiplied with, [K, WIDE].
template <class X, class Out, class Pack>
void multiply(const X* x, long rows, long K, long columns, bool add, Out* out, long ldo, float* packed, const Pack& pack) {
    const float* from = reinterpret_cast<const float*>(x);
    for (long j = 0; j < columns; j += WIDE) {
        long there = std::min<long>(WIDE, columns - j);
        pack(j, there, packed);
        strip<X>(Strip<Out>{from, out + j, out + j, units<X>(K), ldo, add ? 1.0f : 0.0f, 1, false, rows, there}, rows, packed,
                 units<X>(K));
    }
}

}  // namespace
