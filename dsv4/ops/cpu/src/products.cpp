// Products of BF16 matrices with FP32 results, for training: torch rounds what it multiplies in BF16 to BF16.
#include "units.h"

namespace {

typedef As<bf16> X;
constexpr long SLAB = 576, DEPTH = 1024;  // rows of one thread, and numbers of a sum, at a time; SLAB is whole tiles
static_assert(SLAB % ROWS == 0, "a slab is whole tiles");

// A matrix [rows, columns], of which rows lie in one piece, or columns (turned); ld: numbers from one to the next.
struct Given {
    const bf16* numbers;
    long ld;
    bool turned;
    const bf16* at(long row, long column) const { return turned ? numbers + column * ld + row : numbers + row * ld + column; }
};

// What a thread does at a time: a slab of rows, and where these are few, some of the columns.
struct Cut {
    long high, wide, slabs, parts;
    Cut(long n, long m) {
        const long threads = omp_get_max_threads(), few = 8 * ROWS * threads;
        slabs = std::max<long>(1, n < few ? 1 : up((n + SLAB - 1) / SLAB, threads));
        high = up((n + slabs - 1) / slabs, ROWS), slabs = (n + high - 1) / high;
        parts = n < few ? std::min<long>(threads, (m + WIDE - 1) / WIDE) : 1;
        wide = up((m + parts - 1) / parts, WIDE), parts = (m + wide - 1) / wide;
    }
};

}  // namespace

// out [n, m] FP32, `ldo` from row to row, = a [n, K] b [K, m], both BF16; added to out where `add`
EXPORT(dot)
(const void* a_numbers, long lda, int a_turned, const void* b_numbers, long ldb, int b_turned, long n, long K, long m, int add,
 float* out, long ldo) {
    const Given a{static_cast<const bf16*>(a_numbers), lda, bool(a_turned)}, b{static_cast<const bf16*>(b_numbers), ldb, bool(b_turned)};
    if (!n || !m) return;
    const Cut cut(n, m);
    const long deepest = std::min(K, DEPTH), deep = whole<X>(deepest), tasks = cut.slabs * cut.parts;
#pragma omp parallel if (tasks > 1 && n * K * m > 60000)
    {
        static thread_local Room room;
        room.open((cut.high + WIDE) * deep * sizeof(X) + (cut.high + WIDE) * units<X>(deep) * sizeof(float) + 4 * 64);
        X *x = room.take<X>(cut.high * deep), *some = room.take<X>(WIDE * deep);
        float *turning = room.take<float>(cut.high * units<X>(deep)), *packed = room.take<float>(WIDE * units<X>(deep));
#pragma omp for schedule(static, 1)
        for (long task = 0; task < tasks; task++) {
            const long i = task / cut.parts * cut.high, j = task % cut.parts * cut.wide;
            const long rows = std::min(cut.high, n - i), columns = std::min(cut.wide, m - j);
            float* to = out + i * ldo + j;
            if (!K && !add)
                for (long r = 0; r < rows; r++) std::fill(to + r * ldo, to + r * ldo + columns, 0.0f);
            for (long k = 0; k < K; k += DEPTH) {
                const long depth = std::min(DEPTH, K - k);
                if (a.turned) turn_rows<bf16>(a.at(i, k), lda, depth, rows, turning, x);
                else {
                    for (long r = 0; r < rows; r++) convert<bf16>(a.at(i + r, k), depth, x + r * whole<X>(depth));
                    fill_up(x, depth, rows);
                }
                auto run = [&](const auto& pack) { multiply(x, rows, depth, columns, add || k, to, ldo, packed, pack); };
                if (b.turned) run(Turned<bf16, bf16>{b.at(k, j), ldb, depth, some});
                else run(Plain<bf16, bf16>{b.at(k, j), ldb, depth});
            }
        }
    }
}
