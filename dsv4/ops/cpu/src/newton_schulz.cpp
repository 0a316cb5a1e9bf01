// Muon's orthogonalisation and its whole update, a matrix at a time in each thread: what it computes with stays in that
// core's second cache, or close to it. ops/newton_schulz.py has the plain form.
//
// The matrix X [a, b] is that of a <= b: a tall one is turned as it comes in. Rows and columns are filled up with zeros to
// whole tiles, which stay zero. X X^T and the polynomials of it are symmetric: the tiles on and above the diagonal are
// computed, the rest is their mirror image. X <- s X + P X happens in place, strip by strip of columns.
#include "room.h"

namespace {

// A tile is ROWS x WIDE numbers: as many vectors of sums as fit into registers.
#if defined(__AVX512F__)
constexpr int ROWS = 12;
#else
constexpr int ROWS = 6;
#endif
constexpr int WIDE = 2 * LANES;
constexpr long DEEP = 256;  // numbers of a sum that are added up in a go: their strip stays in the first cache

INLINE long up(long x, long step) { return (x + step - 1) / step * step; }

// The sums of M rows (members, not an array: matmul.h says why).
template <int M> struct Tile {
    vf s0 = {}, s1 = {};
    Tile<M - 1> below;
    INLINE void add(const float* x, long ldx, vf w0, vf w1) {
        vf a = splat(*x);
        s0 = s0 + a * w0, s1 = s1 + a * w1;
        below.add(x + ldx, ldx, w0, w1);
    }
    template <class Write> INLINE void write(const Write& to, long row) const {
        to(row, 0, s0), to(row, LANES, s1);
        below.write(to, row + 1);
    }
};
template <> struct Tile<0> {
    INLINE void add(const float*, long, vf, vf) {}
    template <class Write> INLINE void write(const Write&, long) const {}
};

// One product of a strip: out = keep * base + scale * x w. w [K, WIDE] packed, base and out [rows, WIDE] of a matrix.
struct Strip {
    const float *x, *base;
    float* out;
    long ldx, ld;  // ld: of base and out
    float keep, scale;
    bool rounded;  // to BF16, once the sum is whole
};

INLINE vf as_bf16(vf v) {
    bf16 part[LANES];
    store(part, v);
    return load(part);
}

__attribute__((noinline)) void tile(const Strip& s, long row, const float* w, long K) {
    Tile<ROWS> sums;
    const float* x = s.x + row * s.ldx;
    for (long k = 0; k < K; k++, x++, w += WIDE) sums.add(x, s.ldx, load(w), load(w + LANES));
    sums.write(
        [&](long r, long c, vf sum) __attribute__((always_inline)) {
            long at = (row + r) * s.ld + c;
            vf v = sum * s.scale;
            if (s.keep != 0) v = v + s.keep * load(s.base + at);
            store(s.out + at, s.rounded ? as_bf16(v) : v);
        },
        0);
}

// The strip's first `rows` rows, the sum in pieces of DEEP.
void strip(Strip s, long rows, const float* w, long K) {
    const bool rounded = s.rounded;
    for (long k = 0; k < K; k += DEEP) {
        s.rounded = rounded && k + DEEP >= K;
        for (long row = 0; row < rows; row += ROWS) tile(s, row, w + k * WIDE, std::min(DEEP, K - k));
        s.x += DEEP, s.base = s.out, s.keep = 1;
    }
}

// to[j][i] = from[i][j] for 8 x 8 numbers
INLINE void turn8(const float* from, long ld, float* to, long ldo) {
    __m256 r[8], t[8];
    for (int i = 0; i < 8; i++) r[i] = _mm256_loadu_ps(from + i * ld);
    for (int i = 0; i < 4; i++) {
        t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
    }
    for (int i = 0; i < 2; i++) {
        __m256 *a = t + 4 * i, *o = r + 4 * i;
        o[0] = _mm256_shuffle_ps(a[0], a[2], 0x44), o[1] = _mm256_shuffle_ps(a[0], a[2], 0xee);
        o[2] = _mm256_shuffle_ps(a[1], a[3], 0x44), o[3] = _mm256_shuffle_ps(a[1], a[3], 0xee);
    }
    for (int i = 0; i < 4; i++) {
        _mm256_storeu_ps(to + i * ldo, _mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
        _mm256_storeu_ps(to + (i + 4) * ldo, _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
    }
}

// to [columns, rows] = from [rows, columns] turned
void turn(const float* from, long ld, long rows, long columns, float* to, long ldo) {
    for (long i = 0; i < rows; i += 8)
        for (long j = 0; j < columns; j += 8) {
            if (i + 8 <= rows && j + 8 <= columns) turn8(from + i * ld + j, ld, to + j * ldo + i, ldo);
            else
                for (long r = i; r < std::min(i + 8, rows); r++)
                    for (long c = j; c < std::min(j + 8, columns); c++) to[c * ldo + r] = from[r * ld + c];
        }
}

// A symmetric matrix of whole tiles from what is on and above the diagonal of its 8 x 8 blocks.
void mirror(float* g, long side) {
    for (long i = 0; i < side; i += 8)
        for (long j = i; j < side; j += 8) turn8(g + i * side + j, side, g + j * side + i, side);
}

// The polynomial steps of a matrix in its thread's room.
struct Orthogonal {
    long a, b, high, side, wide;  // high: rows of whole tiles; side: of a symmetric matrix; wide: columns of X
    float *x, *gram, *poly, *packed;

    static long side_of(long a) { return up(a, WIDE); }
    static long high_of(long a) { return std::max(up(a, ROWS), up(side_of(a), ROWS)); }
    static long numbers(long a, long b) {
        long side = side_of(a), high = high_of(a);
        return high * (up(b, WIDE) + 2 * side) + WIDE * std::max(side, b);
    }
    Orthogonal(long a, long b, Room& room) : a(a), b(b), high(high_of(a)), side(side_of(a)), wide(up(b, WIDE)) {
        x = room.take<float>(high * wide);
        gram = room.take<float>(high * side), poly = room.take<float>(high * side);
        packed = room.take<float>(WIDE * std::max(side, b));
        for (long i = 0; i < high; i++) std::fill(x + i * wide + (i < a ? b : 0), x + (i + 1) * wide, 0.0f);
        for (float* g : {gram, poly}) std::fill(g + side * side, g + high * side, 0.0f);
    }

    // X over its Frobenius norm; the largest number is divided out first, since the squares of small ones vanish.
    void unit_norm(bool rounded) {
        vf most = {};
        each([&](vf& v) {
            vf size = as_float(as_bits(v) & 0x7fffffff);
            most = max(size, most);
        });
        float part[LANES], largest = 0;
        store(part, most);
        for (float p : part) largest = std::max(largest, p);
        if (largest == 0) largest = 1;
        double total = 0;
        for (long i = 0; i < a; i++) {
            vf squares = {};
            for (long j = 0; j < wide; j += LANES) {
                vf v = load(x + i * wide + j) / largest;
                store(x + i * wide + j, v);
                squares += v * v;
            }
            total += sum(squares);
        }
        float norm = float(std::sqrt(total));
        if (norm == 0) norm = 1;
        each([&](vf& v) {
            v = v / norm;
            if (rounded) v = as_bf16(v);
        });
    }

    // X <- p(X): s_a X + (s_b G + s_c G^2) X with G = X X^T
    void step(const float* s, bool rounded) {
        for (long j = 0; j < side; j += WIDE) {  // rows j.. of X, turned: the columns of X^T
            turn(x + j * wide, wide, WIDE, b, packed, WIDE);
            strip({x, nullptr, gram + j, wide, side, 0, 1, rounded}, std::min(up(j + WIDE, ROWS), high), packed, b);
        }
        mirror(gram, side);
        for (long j = 0; j < side; j += WIDE) {
            pack(gram + j, side);
            strip({gram, gram + j, poly + j, side, side, s[1], s[2], rounded}, std::min(up(j + WIDE, ROWS), high), packed, a);
        }
        mirror(poly, side);
        for (long j = 0; j < wide; j += WIDE) {
            pack(x + j, wide);
            strip({poly, x + j, x + j, side, wide, s[0], 1, rounded}, up(a, ROWS), packed, a);
        }
    }

  private:
    template <class F> INLINE void each(const F& f) {
        for (long i = 0; i < a * wide; i += LANES) {
            vf v = load(x + i);
            f(v);
            store(x + i, v);
        }
    }
    void pack(const float* from, long ld) {
        for (long k = 0; k < a; k++) std::memcpy(packed + k * WIDE, from + k * ld, WIDE * sizeof(float));
    }
};

struct Polynomials {
    const float* steps;
    long count;
    bool rounded;
    void run(Orthogonal& o) const {
        o.unit_norm(rounded);
        for (long i = 0; i < count; i++) o.step(steps + 3 * i, rounded);
    }
};

// X = the orthogonal factor of a matrix [rows, columns]. `in(row, to)` writes one of its rows, `out(row, from)` gets one of
// X's; a tall matrix is turned on both ways, eight rows at a time.
template <class In, class Out>
void orthogonalise(long rows, long columns, const Polynomials& polynomials, const In& in, const Out& out) {
    static thread_local Room room;
    const long a = std::min(rows, columns), b = std::max(rows, columns);
    room.open(Orthogonal::numbers(a, b) * sizeof(float) + 4 * 64);
    Orthogonal o(a, b, room);
    float* some = o.packed;
    for (long r = 0; r < rows; r += 8) {
        const long last = std::min(r + 8, rows);
        for (long i = r; i < last; i++) in(i, rows > columns ? some + (i - r) * columns : o.x + i * o.wide);
        if (rows > columns) turn(some, columns, last - r, columns, o.x + r, o.wide);
    }
    polynomials.run(o);
    for (long r = 0; r < rows; r += 8) {
        const long last = std::min(r + 8, rows);
        if (rows > columns) turn(o.x + r, o.wide, columns, last - r, some, columns);
        for (long i = r; i < last; i++) out(i, rows > columns ? some + (i - r) * columns : o.x + i * o.wide);
    }
}

// A matrix [rows, columns] to be updated, as cpu/newton_schulz.py gives it: all three FP32, rows one after the other.
struct Update {
    float *weight, *momentum;
    const float* grad;
    int64_t rows, columns;
};

}  // namespace

// m -> out, both FP32 [n, rows, columns]; steps [count, 3]: a, b, c of a X + b X X^T X + c (X X^T)^2 X. rounded: every
// product is rounded to BF16, as if it were multiplied in it.
EXPORT(newton_schulz)
(const float* m, long n, long rows, long columns, const float* steps, long count, int rounded, float* out) {
    const Polynomials polynomials{steps, count, bool(rounded)};
#pragma omp parallel for schedule(dynamic, 1) if (n > 1)
    for (long i = 0; i < n; i++) {
        const float* from = m + i * rows * columns;
        float* to = out + i * rows * columns;
        orthogonalise(
            rows, columns, polynomials,
            [&](long row, float* x) { std::memcpy(x, from + row * columns, columns * sizeof(float)); },
            [&](long row, const float* x) { std::memcpy(to + row * columns, x, columns * sizeof(float)); });
    }
}

// M <- mu M + G; W <- keep W + scale sqrt(max(rows, columns)) orthogonalised(mu M + G), for `n` matrices of any sizes
EXPORT(muon_update)
(const void* updates, long n, float mu, float keep, float scale, const float* steps, long count, int rounded) {
    const Polynomials polynomials{steps, count, bool(rounded)};
#pragma omp parallel for schedule(dynamic, 1) if (n > 1)
    for (long i = 0; i < n; i++) {
        const Update& u = static_cast<const Update*>(updates)[i];
        const long columns = u.columns;
        const float size = scale * std::sqrt(float(std::max(u.rows, u.columns)));
        orthogonalise(
            u.rows, columns, polynomials,
            [&](long row, float* x) {
                float* m = u.momentum + row * columns;
                const float* g = u.grad + row * columns;
                for (long c = 0; c < columns; c++) m[c] = mu * m[c] + g[c], x[c] = mu * m[c] + g[c];
            },
            [&](long row, const float* x) {
                float* w = u.weight + row * columns;
                for (long c = 0; c < columns; c++) w[c] = keep * w[c] + size * x[c];
            });
    }
}
