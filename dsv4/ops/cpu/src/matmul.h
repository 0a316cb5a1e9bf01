// Products of rows with rows, out[m][n] = x[m] . w[n], both contiguous along the sum (y = x W^T), for weights in FP32,
// BF16, FP8 or FP4.
//
// One accumulator vector belongs to one output: its lanes sum the products of ascending k, and are then added by halves.
// So a number of the output does not depend on the tile that it is computed in, nor on what is computed beside it.
// BF16 rows are multiplied as they are where the machine can (sums in FP32), and widened to FP32 where it cannot.
#pragma once

#include "simd.h"

namespace {

enum Dtype { F32, BF16, FP8, FP4 };  // as in library.py

// --- what is multiplied: vectors of FP32, or of pairs of BF16 ---

template <class X> struct Dot;

template <> struct Dot<float> {
    typedef vf reg;
    static constexpr int STEP = LANES;
    static INLINE reg get(const float* p) { return load(p); }
    static INLINE reg join(const vf* parts) { return parts[0]; }
    static INLINE vf add(vf acc, reg a, reg b) { return acc + a * b; }
};

#if defined(__AVX512BF16__)
template <> struct Dot<bf16> {
    typedef __m512bh reg;
    static constexpr int STEP = 2 * LANES;
    static INLINE reg get(const bf16* p) { return load_as<reg>(p); }
    static INLINE reg join(const vf* parts) { return _mm512_cvtne2ps_pbh((__m512)parts[1], (__m512)parts[0]); }
    static INLINE vf add(vf acc, reg a, reg b) { return (vf)_mm512_dpbf16_ps((__m512)acc, a, b); }
};
typedef bf16 Product16;  // what BF16 rows are multiplied as
#else
typedef float Product16;
#endif

// --- rows of weights: `at(k)` is one vector of numbers from k on, `some` the last, shorter one; `open(k)` the same row for
// the BLOCK columns around k, which share a scale ---

template <class T> struct PlainRow {
    static constexpr long BLOCK = LONG_MAX;
    const T* p;
    static INLINE bool far(long) { return false; }
    template <bool = false> INLINE PlainRow open(long) const { return *this; }
    INLINE vf at(long k) const { return load(p + k); }
    INLINE vf some(long k, int count) const { return load_some(p + k, count); }
};

INLINE float power_of_two(uint8_t code) {  // UE8M0
    uint32_t bits = code ? uint32_t(code) << 23 : 0x00400000;
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
}

#if defined(__AVX512BF16__)
// e4m3 codes times a scale in BF16, which holds them exactly as long as the scale leaves them normal (`fits`): the exponent is
// added to the codes' own. (A NaN's code becomes 480 of the scale.)
struct Fp8Codes {
    __m512i up, few;  // what is added to codes with an exponent; the numbers of those without, in steps of 2^-9
    bool fits;

    INLINE explicit Fp8Codes(int scale) : fits(scale >= 10 && scale <= 246) {
        const __m512i steps = _mm512_castsi128_si512(_mm_setr_epi16(0, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40, 0x3c60));
        __m512i exponent = _mm512_set1_epi16(short((scale - 127) * 128));
        up = _mm512_add_epi16(exponent, _mm512_set1_epi16(120 * 128));
        few = _mm512_mask_add_epi16(steps, 0xfe, steps, exponent);
    }
    INLINE __m512i numbers(const uint8_t* packed) const {
        __m512i codes = _mm512_cvtepi8_epi16(load_as<__m256i>(packed)), size = _mm512_and_si512(codes, _mm512_set1_epi16(127));
        __m512i normal = _mm512_add_epi16(_mm512_slli_epi16(size, 4), up);
        __mmask32 is_small = _mm512_cmplt_epu16_mask(size, _mm512_set1_epi16(8));
        normal = _mm512_mask_permutexvar_epi16(normal, is_small, size, few);
        return _mm512_ternarylogic_epi32(normal, codes, _mm512_set1_epi16(short(0x8000)), 0xf8);  // a | (b & c)
    }
    static INLINE __mmask32 nans(const uint8_t* packed) {
        __m256i size = _mm256_and_si256(load_as<__m256i>(packed), _mm256_set1_epi8(127));
        return _mm256_cmpeq_epi8_mask(size, _mm256_set1_epi8(127));
    }
};
#endif

// e4m3 codes, a scale for every 128 columns
struct Fp8Row {
    static constexpr long BLOCK = 128;
    const uint8_t *p, *scales;
    // LANES codes / 256. A code with its sign in the highest bit and the rest from bit 7 on is that, as an IEEE half.
    static INLINE vf halves(const uint8_t* codes) {
#if defined(__AVX512F__)
        __m256i wide = _mm256_slli_epi16(_mm256_cvtepi8_epi16(load_as<__m128i>(codes)), 7);
        return (vf)_mm512_cvtph_ps(_mm256_and_si256(wide, _mm256_set1_epi16(short(0xbf80))));
#else
        __m128i wide = _mm_slli_epi16(_mm_cvtepi8_epi16(_mm_cvtsi64_si128(load_as<int64_t>(codes))), 7);
        return (vf)_mm256_cvtph_ps(_mm_and_si128(wide, _mm_set1_epi16(short(0xbf80))));
#endif
    }
    // LANES codes times `scale`; 256 of it unless that is beyond all numbers.
    static INLINE vf scaled(const uint8_t* codes, float scale) {
        float up = scale * 256.0f;
        return __builtin_expect(up < INFINITY, 1) ? halves(codes) * up : halves(codes) * 256.0f * scale;
    }
    // FAR: 256 of the scale is beyond all numbers.
    template <bool FAR> struct Open {
        const uint8_t* p;
        float scale;
#if defined(__AVX512BF16__)
        Fp8Codes codes;
#endif
        INLINE vf at(long k) const { return FAR ? halves(p + k) * 256.0f * scale : halves(p + k) * scale; }
    };
    INLINE bool far(long k) const { return scales[k / 128] > 246; }
    template <bool FAR = false> INLINE Open<FAR> open(long k) const {
        float scale = power_of_two(scales[k / 128]);
#if defined(__AVX512BF16__)
        return {p, FAR ? scale : scale * 256.0f, Fp8Codes(scales[k / 128])};
#else
        return {p, FAR ? scale : scale * 256.0f};
#endif
    }
    INLINE vf at(long k) const { return scaled(p + k, power_of_two(scales[k / 128])); }
    INLINE vf some(long k, int count) const {
        uint8_t part[LANES] = {};
        std::memcpy(part, p + k, count);
        return scaled(part, power_of_two(scales[k / 128]));
    }
};

// e2m1 codes, two to a byte (the even column low), a scale for every 32 columns
struct Fp4Row {
    static constexpr long BLOCK = 32;
    const uint8_t *p, *scales;
    static INLINE vf numbers(const uint8_t* packed) {
#if defined(__AVX512F__)
        __m128i pair = _mm_cvtsi64_si128(load_as<int64_t>(packed));  // 8 bytes: 16 codes
#else
        __m128i pair = _mm_cvtsi32_si128(load_as<int32_t>(packed));  // 4 bytes: 8 codes
#endif
        __m128i nibble = _mm_set1_epi8(15);
        __m128i codes = _mm_unpacklo_epi8(_mm_and_si128(pair, nibble), _mm_and_si128(_mm_srli_epi16(pair, 4), nibble));
#if defined(__AVX512F__)
        vf table = {0, .5f, 1, 1.5f, 2, 3, 4, 6, -0.f, -.5f, -1, -1.5f, -2, -3, -4, -6};
        return (vf)_mm512_permutexvar_ps(_mm512_cvtepu8_epi32(codes), (__m512)table);
#else
        vf table = {0, .5f, 1, 1.5f, 2, 3, 4, 6};
        __m256i code = _mm256_cvtepu8_epi32(codes);
        vf size = (vf)_mm256_permutevar8x32_ps((__m256)table, code);  // by the low three bits
        return as_float(as_bits(size) | (((vu)code & 8) << 28));
#endif
    }
    struct Open {
        const uint8_t* p;
        float scale;
        INLINE vf at(long k) const { return numbers(p + k / 2) * scale; }
    };
    static INLINE bool far(long) { return false; }
    template <bool = false> INLINE Open open(long k) const { return {p, power_of_two(scales[k / 32])}; }
    INLINE vf at(long k) const { return open(k).at(k); }
    INLINE vf some(long k, int count) const {
        uint8_t part[LANES / 2] = {};
        std::memcpy(part, p + k / 2, (count + 1) / 2);
        return numbers(part) * power_of_two(scales[k / 32]);
    }
};

}  // namespace

namespace DSV4_ISA {

// A matrix [rows, columns] in any of the formats.
struct Matrix {
    const void* data;
    const uint8_t* scales;  // FP8, FP4
    long columns, stride;   // stride: numbers from row to row (in FP8 and FP4 the rows lie one after the other)

    // The matrix from row n on (FP8: n at the edge of a block of 128).
    Matrix from(int dtype, long n) const {
        Matrix out = *this;
        const char* bytes = static_cast<const char*>(data);
        long wide = columns;
        if (dtype == F32) out.data = bytes + n * stride * 4;
        else if (dtype == BF16) out.data = bytes + n * stride * 2;
        else if (dtype == FP8) out.data = bytes + n * wide, out.scales += n / 128 * ((wide + 127) / 128);
        else out.data = bytes + n * (wide / 2), out.scales += n * ((wide + 31) / 32);
        return out;
    }

    template <int D> INLINE auto row(long n) const {
        if constexpr (D == F32) return PlainRow<float>{static_cast<const float*>(data) + n * stride};
        else if constexpr (D == BF16) return PlainRow<bf16>{static_cast<const bf16*>(data) + n * stride};
        else if constexpr (D == FP8)
            return Fp8Row{static_cast<const uint8_t*>(data) + n * columns, scales + n / 128 * ((columns + 127) / 128)};
        else return Fp4Row{static_cast<const uint8_t*>(data) + n * (columns / 2), scales + n * ((columns + 31) / 32)};
    }
};

}  // namespace DSV4_ISA
using DSV4_ISA::Matrix;

namespace {

#if defined(__AVX512BF16__)
// 32 numbers of an FP4 row in BF16, which holds them exactly as long as the scale leaves them normal: the exponent is added to
// the codes' own. False where it does not.
INLINE bool narrow_codes(const Fp4Row& row, long k, __m512i& out) {
    const __m512i numbers = _mm512_broadcast_i64x4(_mm256_setr_epi16(
        0, 0x3f00, 0x3f80, 0x3fc0, 0x4000, 0x4040, 0x4080, 0x40c0, short(0x8000), short(0xbf00), short(0xbf80), short(0xbfc0),
        short(0xc000), short(0xc040), short(0xc080), short(0xc0c0)));
    int scale = row.scales[k / 32];
    if (__builtin_expect(scale < 2 || scale > 252, 0)) return false;
    __m512i scaled = _mm512_mask_add_epi16(numbers, 0xfefefefe, numbers, _mm512_set1_epi16(short((scale - 127) * 128)));
    // A byte in each 32 bits: its low code is looked up by the lowest five bits, so that the table is there twice; its high
    // code goes to the upper half.
    __m512i bytes = _mm512_cvtepu8_epi32(load_as<__m128i>(row.p + k / 2));
    out = _mm512_permutexvar_epi16(_mm512_or_si512(bytes, _mm512_slli_epi32(bytes, 12)), scaled);
    return true;
}
#endif

// A vector of what is multiplied, from k on: of a plain row of the same numbers, or widened from any other. open: the row,
// opened at k.
template <class X, class Row, class Open> INLINE typename Dot<X>::reg piece(const Row& row, const Open& open, long k) {
#if defined(__AVX512BF16__)
    if constexpr (std::is_same<X, bf16>::value && std::is_same<Row, Fp8Row>::value) {
        if (__builtin_expect(open.codes.fits, 1)) return (__m512bh)open.codes.numbers(row.p + k);
    }
    if constexpr (std::is_same<X, bf16>::value && std::is_same<Row, Fp4Row>::value) {
        __m512i numbers;
        if (narrow_codes(row, k, numbers)) return (__m512bh)numbers;
    }
#endif
    if constexpr (std::is_same<Row, PlainRow<X>>::value) return Dot<X>::get(row.p + k);
    else {
        vf parts[Dot<X>::STEP / LANES];
        for (int i = 0; i < Dot<X>::STEP / LANES; i++) parts[i] = open.at(k + i * LANES);
        return Dot<X>::join(parts);
    }
}

// What is opened, and for how many columns: in BF16 each vector of FP4 codes has its own scale, and nothing is gained.
#if defined(__AVX512BF16__)
template <class X, class Row> constexpr bool CLOSED = std::is_same<X, bf16>::value && std::is_same<Row, Fp4Row>::value;
#else
template <class X, class Row> constexpr bool CLOSED = false;
#endif
template <class X, class Row> constexpr long SPAN = CLOSED<X, Row> ? LONG_MAX : Row::BLOCK;
template <class X, bool FAR, class Row> INLINE auto opened(const Row& row, long k) {
    if constexpr (CLOSED<X, Row>) return row;
    else return row.template open<FAR>(k);
}

template <class X, class Row> INLINE typename Dot<X>::reg last_piece(const Row& row, long k, long K) {
    vf parts[Dot<X>::STEP / LANES];
    for (int i = 0; i < Dot<X>::STEP / LANES; i++) {
        long from = k + i * LANES;
        parts[i] = from + LANES <= K ? row.at(from) : (from < K ? row.some(from, int(K - from)) : vf{});
    }
    return Dot<X>::join(parts);
}

// --- one tile ---

#if defined(__AVX512F__)
constexpr int MR = 6, NR = 4;
#else
constexpr int MR = 3, NR = 4;
#endif

// The sums over lanes of four vectors, each by halves as `sum` has it.
INLINE __m128 sum4(const vf* a) {
#if defined(__AVX512F__)
    __m512 a0 = (__m512)a[0], a1 = (__m512)a[1], a2 = (__m512)a[2], a3 = (__m512)a[3];
    __m512 p = _mm512_add_ps(_mm512_shuffle_f32x4(a0, a1, 0x44), _mm512_shuffle_f32x4(a0, a1, 0xee));  // 8 and 8 left
    __m512 q = _mm512_add_ps(_mm512_shuffle_f32x4(a2, a3, 0x44), _mm512_shuffle_f32x4(a2, a3, 0xee));
    __m512 v = _mm512_add_ps(_mm512_shuffle_f32x4(p, q, 0x88), _mm512_shuffle_f32x4(p, q, 0xdd));  // 4 of each
    v = _mm512_add_ps(v, _mm512_permute_ps(v, 0x4e));
    v = _mm512_add_ps(v, _mm512_permute_ps(v, 0xb1));
    __m512i firsts = _mm512_setr_epi32(0, 4, 8, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
    return _mm512_castps512_ps128(_mm512_permutexvar_ps(firsts, v));
#else
    __m256 half[2];
    for (int i = 0; i < 2; i++) {
        __m256 b = (__m256)a[2 * i], c = (__m256)a[2 * i + 1];
        __m256 v = _mm256_add_ps(_mm256_permute2f128_ps(b, c, 0x20), _mm256_permute2f128_ps(b, c, 0x31));
        v = _mm256_add_ps(v, _mm256_permute_ps(v, 0x4e));
        half[i] = _mm256_add_ps(v, _mm256_permute_ps(v, 0xb1));  // the sum of b four times, then that of c
    }
    __m128 p = _mm_unpacklo_ps(_mm256_castps256_ps128(half[0]), _mm256_extractf128_ps(half[0], 1));
    __m128 q = _mm_unpacklo_ps(_mm256_castps256_ps128(half[1]), _mm256_extractf128_ps(half[1], 1));
    return _mm_movelh_ps(p, q);
#endif
}

INLINE void store4(float* p, __m128 v) { _mm_storeu_ps(p, v); }
INLINE void store4(bf16* p, __m128 v) {  // rounded as `narrow` does
    __m128i bits = _mm_castps_si128(v), odd = _mm_and_si128(_mm_srli_epi32(bits, 16), _mm_set1_epi32(1));
    __m128i rounded = _mm_srli_epi32(_mm_add_epi32(bits, _mm_add_epi32(odd, _mm_set1_epi32(0x7fff))), 16);
    __m128i nan = _mm_or_si128(_mm_srli_epi32(bits, 16), _mm_set1_epi32(0x40));
    __m128i out = _mm_blendv_epi8(rounded, nan, _mm_castps_si128(_mm_cmpunord_ps(v, v)));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi32(out, out));
}

// The sums of M rows of x with four rows of weights. A row's sums are members, not an array: an array that a loop indexes
// may end up in memory, and then a tile runs at a third of its speed.
template <int M, class X> struct Sums {
    typedef Dot<X> D;
    typedef typename D::reg reg;
    vf s0 = {}, s1 = {}, s2 = {}, s3 = {};
    Sums<M - 1, X> below;

    INLINE void add(const X* x, long ldx, const reg& w0, const reg& w1, const reg& w2, const reg& w3) {
        reg a = D::get(x);
        s0 = D::add(s0, a, w0), s1 = D::add(s1, a, w1), s2 = D::add(s2, a, w2), s3 = D::add(s3, a, w3);
        below.add(x + ldx, ldx, w0, w1, w2, w3);
    }
    // The last columns, from k on
    INLINE void add_last(const X* x, long ldx, long k, long K, const reg& w0, const reg& w1, const reg& w2, const reg& w3) {
        reg a = last_piece<X>(PlainRow<X>{x}, k, K);
        s0 = D::add(s0, a, w0), s1 = D::add(s1, a, w1), s2 = D::add(s2, a, w2), s3 = D::add(s3, a, w3);
        below.add_last(x + ldx, ldx, k, K, w0, w1, w2, w3);
    }
    template <bool SPREAD, class Out> INLINE void write(Out* out, long ldo, int wanted, long step) const {
        const vf sums[] = {s0, s1, s2, s3};
        Out part[4];
        store4(part, sum4(sums));
        if (SPREAD)
            for (int i = 0; i < wanted; i++) out[i * step] = part[i];
        else if (wanted == 4) std::memcpy(out, part, sizeof part);
        else std::memcpy(out, part, wanted * sizeof(Out));
        below.template write<SPREAD>(out + ldo, ldo, wanted, step);
    }
};
template <class X> struct Sums<0, X> {
    typedef typename Dot<X>::reg reg;
    INLINE void add(const X*, long, const reg&, const reg&, const reg&, const reg&) {}
    INLINE void add_last(const X*, long, long, long, const reg&, const reg&, const reg&, const reg&) {}
    template <bool, class Out> INLINE void write(Out*, long, int, long) const {}
};

// out[m][n] for M rows of x (stride ldx) and NR rows w; the first `wanted` columns of out (stride ldo) are written, `step` of
// them apart with SPREAD.
template <int M, bool SPREAD, class X, class Row, class Out>
__attribute__((noinline)) void tile(const X* x, long ldx, const Row* w, long K, Out* out, long ldo, int wanted, long step) {
    static_assert(NR == 4, "Sums has four columns");
    Sums<M, X> sums;
    const Row w0 = w[0], w1 = w[1], w2 = w[2], w3 = w[3];
    constexpr long STEP = Dot<X>::STEP;
    const long even = K / STEP * STEP;
    long k = 0;
    auto block = [&](auto far) __attribute__((always_inline)) {
        constexpr bool FAR = decltype(far)::value;
        const auto o0 = opened<X, FAR>(w0, k), o1 = opened<X, FAR>(w1, k), o2 = opened<X, FAR>(w2, k), o3 = opened<X, FAR>(w3, k);
        for (const long end = even - k > SPAN<X, Row> ? k + SPAN<X, Row> : even; k < end; k += STEP)
            sums.add(x + k, ldx, piece<X>(w0, o0, k), piece<X>(w1, o1, k), piece<X>(w2, o2, k), piece<X>(w3, o3, k));
    };
    while (k < even)
        if (w0.far(k) || w1.far(k) || w2.far(k) || w3.far(k)) block(std::true_type());
        else block(std::false_type());
    if (k < K)
        sums.add_last(x, ldx, k, K, last_piece<X>(w0, k, K), last_piece<X>(w1, k, K), last_piece<X>(w2, k, K),
                      last_piece<X>(w3, k, K));
    sums.template write<SPREAD>(out, ldo, wanted, step);
}

// How many of `left` rows the next tile takes: the last ones are shared out, so that none is left alone.
INLINE long next_tile(long left) {
    if (MR < 6) return left == 4 ? 2 : std::min<long>(left, MR);
    if (left == MR || left > MR + 2) return std::min<long>(left, MR);
    return left > 6 ? 4 : left == 5 ? 3 : left;
}

// The same for any number of rows of x.
template <bool SPREAD = false, class X, class Row, class Out>
INLINE void tiles(long M, const X* x, long ldx, const Row* w, long K, Out* out, long ldo, int wanted, long step = 1) {
    for (long m = 0; m < M;) {
        auto run = [&](auto rows) {
            constexpr int R = decltype(rows)::value;
            tile<R, SPREAD>(x + m * ldx, ldx, w, K, out + m * ldo, ldo, wanted, step);
            m += R;
        };
        long rows = next_tile(M - m);
        if (rows == MR) run(std::integral_constant<int, MR>());
        else if (rows == 1) run(std::integral_constant<int, 1>());
        else if (rows == 2) run(std::integral_constant<int, 2>());
        else if constexpr (MR == 6) {
            if (rows == 4) run(std::integral_constant<int, 4>());
            else run(std::integral_constant<int, 3>());
        }
    }
}

constexpr long PANEL = 1 << 15;  // numbers of weights that are widened at a time: they stay in the second cache

// Rows of x as what they are multiplied as: themselves, or widened into `room`.
template <class X, class T> INLINE const X* as_multiplied(const T* x, long count, std::vector<X>& room) {
    if constexpr (std::is_same<X, T>::value) return x;
    else {
        room.resize(count);
        long i = 0;
        for (; i + LANES <= count; i += LANES) store(room.data() + i, load(x + i));
        for (; i < count; i++) room[i] = widen(x[i]);
        return room.data();
    }
}
template <class T> struct Multiplied { typedef T type; };
template <> struct Multiplied<bf16> { typedef Product16 type; };

}  // namespace

namespace DSV4_ISA {

// out[m][n] for the rows n0 <= n < n1 of the weights, of format `dtype`, and all M rows of x; out has stride ldo. `panel` has
// room for PANEL + NR * K numbers. Compiled once, in matmul.cpp.
void product(int dtype, long M, const float* x, long ldx, const Matrix& w, long n0, long n1, float* out, long ldo, float* panel);
void product(int dtype, long M, const Product16* x, long ldx, const Matrix& w, long n0, long n1, bf16* out, long ldo,
             Product16* panel);

}  // namespace DSV4_ISA
using DSV4_ISA::product;
