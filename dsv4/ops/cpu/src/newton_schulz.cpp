// Muon's orthogonalisation and its whole update, a matrix at a time in each thread: what it computes with stays in that
// core's second cache, or close to it. ops/newton_schulz.py has the plain form.
//
// The matrix X [a, b] is that of a <= b: a tall one is turned as it comes in. Rows and columns are filled up with zeros to
// whole tiles, which stay zero. X X^T and the polynomials of it are symmetric: the tiles on and above the diagonal are
// computed, the rest is their mirror image. X <- s X + P X happens in place, strip by strip of columns.
#include "strips.h"

namespace {

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
            strip(Strip<float>{x, nullptr, gram + j, wide, side, 0, 1, rounded}, std::min(up(j + WIDE, ROWS), high), packed, b);
        }
        mirror(gram, side);
        for (long j = 0; j < side; j += WIDE) {
            pack(gram + j, side);
            strip(Strip<float>{gram, gram + j, poly + j, side, side, s[1], s[2], rounded}, std::min(up(j + WIDE, ROWS), high), packed, a);
        }
        mirror(poly, side);
        for (long j = 0; j < wide; j += WIDE) {
            pack(x + j, wide);
            strip(Strip<float>{poly, x + j, x + j, side, wide, s[0], 1, rounded}, up(a, ROWS), packed, a);
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
