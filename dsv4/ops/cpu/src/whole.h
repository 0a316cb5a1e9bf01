// Products of queries with FP4 keys as whole numbers. A key's number is half a small whole number times the scale of its
// block, and a query that was rounded in the same way (ops/formats.py, as_query) is whole numbers times a scale, too. So a
// block of 32 is multiplied and summed exactly in int32, at twice the rate of BF16, and scaled once.
//
// Heads lie in the lanes of a vector, as in heads.h; a lane takes four numbers of a head at a time. A key's even columns
// come before its odd ones, as its nibbles give them, and so do those of queries.
#pragma once

#include "heads.h"
#include "pool.h"

namespace {

constexpr long BLOCK = 32;
constexpr int OFFSET = 12;  // is added to twice a key's numbers, since what is multiplied must not be negative

template <class V> struct Ints;  // as many whole numbers as V has numbers
template <> struct Ints<vf> { typedef vi type; };
#if defined(__AVX512F__)
template <> struct Ints<v8> { typedef int32_t type __attribute__((vector_size(32))); };
#endif

// acc + the sum of four products: bytes of `key` from 0 to 24, of `heads` from -127 to 127
template <class I> INLINE I four_products(I acc, I heads, const uint8_t* key) {
    int32_t bytes = load_as<int32_t>(key);
#if defined(__AVX512VNNI__)
    if constexpr (sizeof(I) == 64) return (I)_mm512_dpbusd_epi32((__m512i)acc, _mm512_set1_epi32(bytes), (__m512i)heads);
    else return (I)_mm256_dpbusd_epi32((__m256i)acc, _mm256_set1_epi32(bytes), (__m256i)heads);
#else
    __m256i pairs = _mm256_maddubs_epi16(_mm256_set1_epi32(bytes), (__m256i)heads);  // below 2^13
    return acc + (I)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#endif
}

// The numbers of two blocks' codes (of one, in the lower half): those of even columns, and of odd ones
INLINE void whole_numbers(__m256i codes, __m256i& even, __m256i& odd) {
    const __m128i few = _mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0);
    const __m256i numbers = _mm256_set_m128i(few, few), nibble = _mm256_set1_epi8(15);
    even = _mm256_shuffle_epi8(numbers, _mm256_and_si256(codes, nibble));
    odd = _mm256_shuffle_epi8(numbers, _mm256_and_si256(_mm256_srli_epi16(codes, 4), nibble));
}

// A key: D bytes of numbers, then the scales of its blocks in FP32. Two blocks lie together, the even columns of both before
// the odd ones of both, as one vector gives them; a last one lies alone.
INLINE long whole_size(long D) { return D + D / BLOCK * 4; }
INLINE void whole_key(const uint8_t* row, long D, uint8_t* out) {
    const uint8_t* scales = row + D / 2;
    uint32_t* to = reinterpret_cast<uint32_t*>(out + D);
    long blocks = D / BLOCK, b = 0;
    __m256i even, odd;
    for (; b + 2 <= blocks; b += 2) {
        whole_numbers(load_as<__m256i>(row + b * 16), even, odd);
        std::memcpy(out + b * BLOCK, &even, 32), std::memcpy(out + b * BLOCK + 32, &odd, 32);
        __m128i pair = _mm_cvtepu8_epi32(_mm_cvtsi32_si128(load_as<uint16_t>(scales + b)));
        _mm_storel_epi64(reinterpret_cast<__m128i*>(to + b), _mm_slli_epi32(pair, 23));
    }
    if (b < blocks) {
        whole_numbers(_mm256_castsi128_si256(load_as<__m128i>(row + b * 16)), even, odd);
        std::memcpy(out + b * BLOCK, &even, 16), std::memcpy(out + b * BLOCK + 16, &odd, 16);
        to[b] = uint32_t(scales[b]) << 23;
    }
}

// The keys from..from+count-1 of a pool, one after the other.
void whole_keys(const Pool& pool, long from, long count, long D, uint8_t* out) {
    for (long i = 0; i < count;) {
        long left = pool.table ? std::min(count - i, pool.per_page - (from + i) % pool.per_page) : count;
        const uint8_t* row = pool.at(from + i);
        for (long end = i + left; i < end; i++, row += pool.stride, out += whole_size(D)) {
            _mm_prefetch(row + 2048, _MM_HINT_T0);  // pages most often follow each other
            whole_key(row, D, out);
        }
    }
}

#if defined(__AVX512F__)
// --- two keys at a time, for one query of eight heads: its heads take half of a vector, and so two keys fill one ---
//
// Four bytes of a key lie beside those of the other, and so do their scales. The query's panel has each head twice.

INLINE void whole_pair(const uint8_t* a, const uint8_t* b, long D, uint8_t* out) {
    auto both = [](uint8_t* to, __m256i x, __m256i y, long bytes) {
        __m256i low = _mm256_unpacklo_epi32(x, y), high = _mm256_unpackhi_epi32(x, y);
        std::memcpy(to, &low, bytes), std::memcpy(to + bytes, &high, bytes);
    };
    long blocks = D / BLOCK, i = 0;
    const uint8_t *scales_a = a + D / 2, *scales_b = b + D / 2;
    __m256i even[2], odd[2];
    for (; i + 2 <= blocks; i += 2) {
        whole_numbers(load_as<__m256i>(a + i * 16), even[0], odd[0]);
        whole_numbers(load_as<__m256i>(b + i * 16), even[1], odd[1]);
        both(out + i * 64, even[0], even[1], 32), both(out + i * 64 + 64, odd[0], odd[1], 32);
        __m128i s = _mm_cvtepu8_epi32(_mm_cvtsi32_si128(load_as<uint16_t>(scales_a + i)));
        __m128i t = _mm_cvtepu8_epi32(_mm_cvtsi32_si128(load_as<uint16_t>(scales_b + i)));
        s = _mm_slli_epi32(_mm_unpacklo_epi32(s, t), 23);
        std::memcpy(out + 2 * D + i * 8, &s, 16);
    }
    if (i < blocks) {
        whole_numbers(_mm256_castsi128_si256(load_as<__m128i>(a + i * 16)), even[0], odd[0]);
        whole_numbers(_mm256_castsi128_si256(load_as<__m128i>(b + i * 16)), even[1], odd[1]);
        both(out + i * 64, even[0], even[1], 16), both(out + i * 64 + 32, odd[0], odd[1], 16);
        uint32_t scales[] = {uint32_t(scales_a[i]) << 23, uint32_t(scales_b[i]) << 23};
        std::memcpy(out + 2 * D + i * 8, scales, 8);
    }
}

// The keys from..from+count-1 of a pool in pairs, the last with itself.
void whole_pairs(const Pool& pool, long from, long count, long D, const uint8_t** found, uint8_t* out) {
    pool.addresses(from, count, found);
    for (long i = 0; i < count; i += 2, out += 2 * whole_size(D)) {
        _mm_prefetch(found[i] + 2048, _MM_HINT_T0), _mm_prefetch(found[i] + 2112, _MM_HINT_T0);
        whole_pair(found[i], found[std::min(i + 1, count - 1)], D, out);
    }
}

// acc[m]: the products of M pairs with the heads of a panel, those of a pair side by side.
template <int M> INLINE void spread_pairs(const int8_t* panel, const uint8_t* pairs, long D, vf (*acc)[1]) {
    vf totals[M] = {};
    for (long b = 0; b < D / BLOCK; b++, panel += LANES * (BLOCK + 8)) {
        bool paired = (b | 1) < D / BLOCK;
        const uint8_t* first = pairs + (paired ? b / 2 * 128 + b % 2 * 16 : b * 64);
        long step = paired ? 32 : 16;
        vi sums[M];
        for (int m = 0; m < M; m++) sums[m] = load_as<vi>(panel + LANES * BLOCK);
        for (int g = 0; g < BLOCK / 4; g++) {
            __m512i heads = load_as<__m512i>(panel + g * LANES * 4);
            for (int m = 0; m < M; m++) {
                __m512i bytes = _mm512_set1_epi64(load_as<int64_t>(first + m * 2 * whole_size(D) + g / 2 * step + g % 2 * 8));
                sums[m] = (vi)_mm512_dpbusd_epi32((__m512i)sums[m], bytes, heads);
            }
        }
        vf scales = load_as<vf>(panel + LANES * (BLOCK + 4));
        for (int m = 0; m < M; m++) {
            vf both = (vf)_mm512_set1_epi64(load_as<int64_t>(pairs + m * 2 * whole_size(D) + 2 * D + b * 8));
            totals[m] = fused(__builtin_convertvector(sums[m], vf) * scales, both, totals[m]);
        }
    }
    for (int m = 0; m < M; m++) acc[m][0] = totals[m];
}
#endif

// Queries in panels like those of heads.h. Of each panel and block: [8][columns][4] bytes; what the offset adds to a sum,
// to be taken away, int32 [columns]; and scales, FP32 [columns].
INLINE long whole_panels_size(long columns, long D) { return columns * (D + D / BLOCK * 8); }

// The whole part; INT_MIN where it is no int32.
INLINE vi whole(vf x) {
#if defined(__AVX512F__)
    return (vi)_mm512_cvttps_epi32((__m512)x);
#else
    return (vi)_mm256_cvttps_epi32((__m256)x);
#endif
}

// A head's block as whole numbers and their scale; false where it is not such.
template <class T> bool whole_block(const T* row, int8_t* numbers, float& scale) {
    vf most = {};
    for (long i = 0; i < BLOCK; i += LANES) most = max(as_float(as_bits(load(row + i)) & 0x7fffffff), most);
    float part[LANES];
    store(part, most);
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) part[i] = std::max(part[i], part[i + half]);
    float top = part[0];
    if (!(top < 0x1p120f)) return false;  // nor is NaN
    uint32_t bits;
    std::memcpy(&bits, &top, 4);
    int exponent = int(bits >> 23) - 6;  // the largest number is then from 64 to 127
    if (top == 0) exponent = 127;
    if (exponent < 2) return false;
    uint32_t up = uint32_t(254 - exponent) << 23, down = uint32_t(exponent) << 23;
    float inverse;
    std::memcpy(&inverse, &up, 4), std::memcpy(&scale, &down, 4);
    int32_t all[BLOCK];
    vi wrong = {};
    for (long i = 0; i < BLOCK; i += LANES) {
        vf x = load(row + i) * inverse;
        vi n = whole(x);
        std::memcpy(all + i, &n, sizeof n);
        wrong |= __builtin_convertvector(n, vf) != x;
    }
    uint64_t some = 0, any[LANES / 2];
    std::memcpy(any, &wrong, sizeof any);
    for (uint64_t two : any) some |= two;
    for (long i = 0; i < BLOCK / 2; i++) numbers[i] = int8_t(all[2 * i]), numbers[i + 16] = int8_t(all[2 * i + 1]);
    return !some;
}

// Whether all heads of a query are whole numbers.
template <class T> bool is_whole(const T* rows, long H, long D) {
    int8_t numbers[BLOCK];
    float scale;
    for (long i = 0; i < H * D; i += BLOCK)
        if (!whole_block(rows + i, numbers, scale)) return false;
    return true;
}

// As lay_panels: `rows` has `columns` addresses, null for a head that is not there.
template <class T> void lay_whole_panels(const T* const* rows, long columns, long D, int8_t* out) {
    for (long c = 0; c < columns; c += panel_columns(columns - c)) {
        long wide = panel_columns(columns - c);
        for (long b = 0; b < D / BLOCK; b++) {
            int8_t* block = out + c * (D + D / BLOCK * 8) + b * wide * (BLOCK + 8);
            int32_t* corrections = reinterpret_cast<int32_t*>(block + wide * BLOCK);
            float* scales = reinterpret_cast<float*>(corrections + wide);
            for (long i = 0; i < wide; i++) {
                int8_t numbers[BLOCK] = {};
                scales[i] = 0;
                if (rows[c + i]) whole_block(rows[c + i] + b * BLOCK, numbers, scales[i]);
                scales[i] *= 0.5f;  // since keys are doubled
                int total = 0;
                for (long k = 0; k < BLOCK; k++) {
                    block[(k / 4 * wide + i) * 4 + k % 4] = numbers[k];
                    total += numbers[k];
                }
                corrections[i] = -OFFSET * total;
            }
        }
    }
}

// acc[m][n]: the products of M keys with N vectors of heads, a panel that is N vectors wide.
template <int M, int N, class V>
INLINE void spread_whole(const int8_t* panel, const uint8_t* const* keys, long D, V (*acc)[N]) {
    if constexpr (M * N > (LANES == 8 ? 4 : 8)) {  // more sums than there are registers
        spread_whole<M / 2, N>(panel, keys, D, acc);
        spread_whole<M / 2, N>(panel, keys + M / 2, D, acc + M / 2);
    } else {
        typedef typename Ints<V>::type I;
        constexpr int L = lanes<V>(), wide = N * L;
        V totals[M][N] = {};
        for (long b = 0; b < D / BLOCK; b++, panel += wide * (BLOCK + 8)) {
            bool paired = (b | 1) < D / BLOCK;
            long even = paired ? b / 2 * 64 + b % 2 * 16 : b * BLOCK, odd = even + (paired ? 32 : 16);
            I sums[M][N], heads[N];
            V scales[N];
            for (int n = 0; n < N; n++) {
                for (int m = 0; m < M; m++) sums[m][n] = load_as<I>(panel + wide * BLOCK + n * L * 4);
                scales[n] = load_as<V>(panel + wide * (BLOCK + 4) + n * L * 4);
            }
            for (int g = 0; g < BLOCK / 4; g++) {
                for (int n = 0; n < N; n++) heads[n] = load_as<I>(panel + (g * wide + n * L) * 4);
                for (int m = 0; m < M; m++)
                    for (int n = 0; n < N; n++) sums[m][n] = four_products(sums[m][n], heads[n], keys[m] + (g < 4 ? even : odd) + g % 4 * 4);
            }
            for (int m = 0; m < M; m++) {
                float scale = load_as<float>(keys[m] + D + b * 4);
                for (int n = 0; n < N; n++)
                    totals[m][n] = fused(__builtin_convertvector(sums[m][n], V) * scales[n], scale - V{}, totals[m][n]);
            }
        }
        std::memcpy(acc, totals, sizeof totals);
    }
}

}  // namespace
