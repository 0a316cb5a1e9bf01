// Rows of a memory: pooled from closed groups of tokens, rotated, and packed into bytes and back (ops/formats.py).
#include "calls.h"
#include "norm.h"

namespace {

// --- rotation ---

// x [rows, D], `heads` rows to a turn [rows / heads, pairs]
template <class T>
void rotate(const T* x, long rows, long heads, long D, const float* turn, long pairs, float sign, T* out) {
    long plain = D - 2 * pairs;
#pragma omp parallel for schedule(static) if (rows * D > 200000)
    for (long r = 0; r < rows; r++) {
        std::memcpy(out + r * D, x + r * D, plain * sizeof(T));
        turn_pairs(x + r * D + plain, out + r * D + plain, turn + r / heads * 2 * pairs, pairs, sign);
    }
}

// --- pooling ---

struct Groups {
    const float *values, *scores;       // rows of c * d numbers
    long value_stride, score_stride, R;  // from row to row; how many rows there are
    const int64_t* first_row;
    const uint8_t* has_previous;
    long r;
    bool overlap;
    long d;
};

constexpr int WIDE = 4;  // vectors of channels at a time: a row is read in whole cache lines

// `count` rows of one half of the channels, from row `row` on
struct Run {
    const float *values, *scores;
    long count;
};

// Channels from i on of the pooled rows of two runs: per channel a softmax of the scores, and the values' mean by it.
template <int W> INLINE void pool(const Run* runs, const Groups& g, long i, long left, vf* out) {
    vf top[W], total[W] = {}, mixed[W] = {};
    for (vf& v : top) v = splat(-INFINITY);
    for (int a = 0; a < 2; a++)
        for (long row = 0; row < runs[a].count; row++)
            for (int w = 0; w < W; w++) {
                long at = i + w * LANES, there = left - w * LANES;
                top[w] = max(load_up_to(runs[a].scores + row * g.score_stride + at, there), top[w]);
            }
    for (int a = 0; a < 2; a++)
        for (long row = 0; row < runs[a].count; row++)
            for (int w = 0; w < W; w++) {
                long at = i + w * LANES, there = left - w * LANES;
                vf p = exp(load_up_to(runs[a].scores + row * g.score_stride + at, there) - top[w]);
                total[w] = total[w] + p;
                mixed[w] = mixed[w] + p * load_up_to(runs[a].values + row * g.value_stride + at, there);
            }
    for (int w = 0; w < W; w++) out[w] = mixed[w] / total[w];
}

template <class T> void pool_group(const Groups& g, long group, T* out) {
    long row = g.first_row[group];
    if (row < 0 || row + g.r > g.R) {  // no such rows: nothing is read
        for (long i = 0; i < g.d; i++) store(out + i, NAN);
        return;
    }
    long half = g.overlap ? g.d : 0;  // where the channels begin that speak for a row's own group
    Run runs[2] = {{}, {g.values + row * g.value_stride + half, g.scores + row * g.score_stride + half, g.r}};
    if (g.overlap && g.has_previous[group] && row >= g.r)
        runs[0] = {g.values + (row - g.r) * g.value_stride, g.scores + (row - g.r) * g.score_stride, g.r};
    vf v[WIDE];
    long i = 0;
    for (; i + WIDE * LANES <= g.d; i += WIDE * LANES) {
        pool<WIDE>(runs, g, i, WIDE * LANES, v);
        for (int w = 0; w < WIDE; w++) store(out + i + w * LANES, v[w]);
    }
    for (; i < g.d; i += LANES) {
        pool<1>(runs, g, i, g.d - i, v);
        store_up_to(out + i, v[0], g.d - i);
    }
}

template <class T>
void compress(
    const Groups& g, long count, const float* gain, float eps, const float* turn, long pairs, float sign, T* out) {
    long plain = g.d - 2 * pairs;
#pragma omp parallel for schedule(dynamic, 1) if (count * g.r * g.d > 20000)
    for (long i = 0; i < count; i++) {
        T* row = out + i * g.d;
        pool_group(g, i, row);
        rms_norm(row, g.d, gain, eps);
        turn_pairs(row + plain, row + plain, turn + i * 2 * pairs, pairs, sign);
    }
}

// --- packed rows ---

struct Format {
    long width, block, tail, row_bytes;
    bool fp4, fp32_scales, rotated;

    long coded() const { return width - tail; }
    long code_bytes() const { return fp4 ? (coded() + 1) / 2 : coded(); }
    long blocks() const { return (coded() + block - 1) / block; }
    long scale_bytes() const { return blocks() * (fp32_scales ? 4 : 1); }
    float top() const { return fp4 ? 6.0f : 448.0f; }
    float floor() const { return fp4 ? 6.0f * 0x1p-126f : 1e-4f; }
};

// Neighbouring blocks of HALF lanes become their sum and difference.
template <int HALF> INLINE vf butterfly(vf v) {
    vi other;
    vu sign;
    for (int i = 0; i < LANES; i++) {
        other[i] = i ^ HALF;
        sign[i] = i & HALF ? 0x80000000u : 0;
    }
    return __builtin_shuffle(v, other) + as_float(as_bits(v) ^ sign);
}

// x [n] times the Sylvester-Walsh matrix times n^-0.5: neighbouring blocks of 1, 2, 4, ... become sum and difference.
void hadamard(float* x, long n) {
    long half = 1;
    if (n >= LANES) {
        for (long i = 0; i < n; i += LANES) {
            vf v = butterfly<4>(butterfly<2>(butterfly<1>(load(x + i))));
            if (LANES == 16) v = butterfly<8>(v);
            store(x + i, v);
        }
        half = LANES;
    }
    for (; half < n; half *= 2)
        for (long i = 0; i < n; i += 2 * half)
            for (long j = i; j < i + half; j++) {
                float a = x[j], b = x[j + half];
                x[j] = a + b;
                x[j + half] = a - b;
            }
    float scale = float(1 / std::sqrt(double(n)));
    for (long i = 0; i < n; i++) x[i] *= scale;
}

// Codes of numbers within the format's range, to nearest, ties to the even code: sign, exponent of this bias, mantissa
template <int MANTISSA, int BIAS> INLINE vu encode(vf x) {
    constexpr int DROP = 23 - MANTISSA, SIGN = MANTISSA == 3 ? 7 : 3;
    constexpr float SMALLEST = MANTISSA == 3 ? 0x1p-6f : 1.0f;  // that is normal
    vf steps = splat(SMALLEST * float(1 << DROP));              // a unit in its last place is the step below SMALLEST
    vu bits = as_bits(x), size = bits & 0x7fffffff;
    vu normal = ((size + ((1u << (DROP - 1)) - 1) + ((size >> DROP) & 1)) >> DROP) - ((127 - BIAS) << MANTISSA);
    vu low = as_bits(as_float(size) + steps) - as_bits(steps);
    vu is_low = (vu)(as_float(size) < SMALLEST);
    return (low & is_low) | (normal & ~is_low) | (bits >> 31 << SIGN);
}

INLINE void store_codes(uint8_t* p, vu codes, long count) {
    vb bytes = to_bytes(codes);
    if (count >= LANES) std::memcpy(p, &bytes, LANES);
    else std::memcpy(p, &bytes, count);
}

INLINE float from_bits(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

// The exponent, as its byte, of the least power of two from 2^-126 up that is not below `ratio`
INLINE uint32_t exponent_above(float ratio) {
    uint32_t bits;
    ratio = std::max(ratio, 0x1p-126f);
    std::memcpy(&bits, &ratio, 4);
    return (bits + 0x7fffff) >> 23;
}

// The largest lane of numbers that are not NaN
INLINE float top_lane(vf v) {
#if defined(__AVX512F__)
    __m256 half = _mm256_max_ps(_mm512_castps512_ps256((__m512)v), _mm512_extractf32x8_ps((__m512)v, 1));
#else
    __m256 half = (__m256)v;
#endif
    __m128 x = _mm_max_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}

// x [width] -> bytes; codes: room for coded() + LANES bytes
template <bool FP4>
void pack_row(const float* __restrict x, const Format& f, uint8_t* __restrict out, uint8_t* __restrict codes) {
    uint8_t* scales = out + f.code_bytes() + 2 * f.tail;
    vf high = splat(f.top()), low = splat(-f.top());
    uint8_t* to = FP4 ? codes : out;
    for (long b = 0; b < f.blocks(); b++) {
        long first = b * f.block, end = std::min(f.coded(), first + f.block);
        vf most = splat(f.floor());
        for (long i = first; i < end; i += LANES)
            most = max(as_float(as_bits(load_up_to(x + i, end - i)) & 0x7fffffff), most);
        float scale = top_lane(most) / f.top(), inverse = 0;
        if (f.fp32_scales) std::memcpy(scales + 4 * b, &scale, 4);
        else {
            uint32_t exponent = exponent_above(scale);
            scales[b] = uint8_t(exponent);
            inverse = from_bits((254 - exponent) << 23);  // a product with it is the quotient
        }
        for (long i = first; i < end; i += LANES) {
            vf v = load_up_to(x + i, end - i);
            v = max(min(f.fp32_scales ? v / scale : v * inverse, high), low);
            store_codes(to + i, FP4 ? encode<1, 1>(v) : encode<3, 7>(v), end - i);
        }
    }
    if (FP4) {
        if (f.coded() % 2) codes[f.coded()] = 0;
        for (long i = 0; i < f.code_bytes(); i++) out[i] = codes[2 * i] | codes[2 * i + 1] << 4;
    }
    for (long i = 0; i < f.tail; i += LANES) {
        bf16 part[LANES];
        long left = f.tail - i;
        store(part, load_up_to(x + f.coded() + i, left));
        std::memcpy(out + f.code_bytes() + 2 * i, part, 2 * std::min<long>(LANES, left));
    }
    uint8_t* end = scales + f.scale_bytes();
    std::memset(end, 0, out + f.row_bytes - end);
}

template <class T> void pack(const T* rows, long n, const Format& f, uint8_t* out) {
#pragma omp parallel if (n * f.width > 50000)
    {
        std::vector<float> x(f.width + LANES);
        std::vector<uint8_t> codes(f.fp4 ? f.width + LANES : 0);
#pragma omp for schedule(static)
        for (long i = 0; i < n; i++) {
            const T* row = rows + i * f.width;
            for (long j = 0; j < f.width; j += LANES) store(x.data() + j, load_up_to(row + j, f.width - j));
            if (f.rotated) {
                hadamard(x.data(), f.width);
                for (long j = 0; j < f.width; j += LANES) {  // rounded to what rows came in
                    T part[LANES];
                    store(part, load(x.data() + j));
                    store(x.data() + j, load(part));
                }
            }
            auto pack_row_as = f.fp4 ? pack_row<true> : pack_row<false>;
            pack_row_as(x.data(), f, out + i * f.row_bytes, codes.data());
        }
    }
}

INLINE vf e4m3_numbers(vb codes) {
#if defined(__AVX512F__)
    vh c = (vh)_mm256_cvtepu8_epi16((__m128i)codes);
#else
    vh c = (vh)_mm_cvtepu8_epi16(_mm_cvtsi64_si128((long long)codes));
#endif
    vh half = ((c & 0x80) << 8) | ((c & 0x7f) << 7);  // the same number * 2^-8 as an IEEE half
    half |= (vh)((c & 0x7f) == 0x7f) & 0x7fff;        // NaN
#if defined(__AVX512F__)
    return (vf)_mm512_cvtph_ps((__m256i)half) * 256.0f;
#else
    return (vf)_mm256_cvtph_ps((__m128i)half) * 256.0f;
#endif
}

// LANES numbers of codes that lie one to a byte
INLINE vf e2m1_numbers(vb codes) {
    vu c = widen(codes), size = c & 7;
    vu bits = (size << 22) + (126u << 23);            // from 1 on: two bits of exponent, one of mantissa
    vu small = size * (126u << 23);                   // 0 and a half
    bits = size < 2 ? small : bits;
    return as_float(bits | (c & 8) << 28);
}

// bytes -> out [width]; codes: room for coded() + LANES + 1 bytes
template <bool FP4, class T>
void unpack_row(const uint8_t* __restrict data, const Format& f, T* __restrict out, uint8_t* __restrict codes) {
    const uint8_t* scales = data + f.code_bytes() + 2 * f.tail;
    const uint8_t* from = data;
    if (FP4) {
        for (long i = 0; i < f.code_bytes(); i++) {
            codes[2 * i] = data[i] & 15;
            codes[2 * i + 1] = data[i] >> 4;
        }
        from = codes;
    }
    for (long b = 0; b < f.blocks(); b++) {
        long first = b * f.block, end = std::min(f.coded(), first + f.block);
        float scale = from_bits(uint32_t(scales[b]) << 23);
        if (f.fp32_scales) std::memcpy(&scale, scales + 4 * b, 4);
        for (long i = first; i < end; i += LANES) {
            vb part = {};
            if (i + LANES <= end) std::memcpy(&part, from + i, LANES);
            else std::memcpy(&part, from + i, end - i);
            store_up_to(out + i, (FP4 ? e2m1_numbers(part) : e4m3_numbers(part)) * scale, end - i);
        }
    }
    for (long i = 0; i < f.tail; i += LANES) {
        bf16 part[LANES] = {};
        long left = f.tail - i;
        std::memcpy(part, data + f.code_bytes() + 2 * i, 2 * std::min<long>(LANES, left));
        store_up_to(out + f.coded() + i, load(part), left);
    }
}

template <class T> void unpack(const uint8_t* data, long n, const Format& f, T* out) {
#pragma omp parallel if (n * f.width > 50000)
    {
        std::vector<uint8_t> codes(f.fp4 ? f.width + LANES : 0);
#pragma omp for schedule(static)
        for (long i = 0; i < n; i++) {
            auto unpack_row_as = f.fp4 ? unpack_row<true, T> : unpack_row<false, T>;
            unpack_row_as(data + i * f.row_bytes, f, out + i * f.width, codes.data());
        }
    }
}

}  // namespace

// x [rows, D] -> out, FP32 or BF16; turn [rows / heads, pairs] complex64
EXPORT(rotate)
(const void* x, int is_bf16, long rows, long heads, long D, const float* turn, long pairs, int conjugate, void* out) {
    float sign = conjugate ? -1 : 1;
    if (is_bf16) rotate(static_cast<const bf16*>(x), rows, heads, D, turn, pairs, sign, static_cast<bf16*>(out));
    else rotate(static_cast<const float*>(x), rows, heads, D, turn, pairs, sign, static_cast<float*>(out));
}

// values, scores [R, c*d] FP32 -> out [count, d] FP32 or BF16
EXPORT(compress)
(const float* values, long value_stride, const float* scores, long score_stride, long R, const int64_t* first_row,
 const uint8_t* has_previous, long count, long r, int overlap, long d, const float* gain, float norm_eps,
 const float* turn, long pairs, int conjugate, int is_bf16, void* out) {
    Groups g{values, scores, value_stride, score_stride, R, first_row, has_previous, r, overlap != 0, d};
    float sign = conjugate ? -1 : 1;
    if (is_bf16) compress(g, count, gain, norm_eps, turn, pairs, sign, static_cast<bf16*>(out));
    else compress(g, count, gain, norm_eps, turn, pairs, sign, static_cast<float*>(out));
}

// rows [n, width] FP32 or BF16 -> bytes [n, row_bytes]
EXPORT(pack_rows)
(const void* rows, int is_bf16, long n, long width, long block, long tail, long row_bytes, int fp4, int fp32_scales,
 int rotated, uint8_t* out) {
    Format f{width, block, tail, row_bytes, fp4 != 0, fp32_scales != 0, rotated != 0};
    if (is_bf16) pack(static_cast<const bf16*>(rows), n, f, out);
    else pack(static_cast<const float*>(rows), n, f, out);
}

// bytes [n, row_bytes] -> numbers [n, width] FP32 or BF16
EXPORT(unpack_rows)
(const uint8_t* data, long n, long width, long block, long tail, long row_bytes, int fp4, int fp32_scales, int is_bf16,
 void* out) {
    Format f{width, block, tail, row_bytes, fp4 != 0, fp32_scales != 0, false};
    if (is_bf16) unpack(data, n, f, static_cast<bf16*>(out));
    else unpack(data, n, f, static_cast<float*>(out));
}
