// A product with a strip of a weight's rows, for every format.
#include "matmul.h"

namespace {

template <int D, class X, class Out>
void product_of(long M, const X* x, long ldx, const Matrix& w, long n0, long n1, Out* out, long ldo, X* panel) {
    typedef decltype(w.row<D>(0)) Row;
    constexpr bool plain = std::is_same<Row, PlainRow<X>>::value;
    long K = w.columns;
    // few rows, of one tile or such as stay in the first cache: each weight is read once, straight from where it lies, as
    // NR streams that begin far apart, which the machine foresees better than rows side by side
    if (M <= MR || (plain && M <= 24 && M * K <= 1 << 13)) {
        long apart = (n1 - n0 + NR - 1) / NR;
        for (long n = n0; n < n0 + apart; n++) {
            Row rows[NR];
            int wanted = int((n1 - n + apart - 1) / apart);
            for (int i = 0; i < NR; i++) rows[i] = w.row<D>(n + std::min(i, wanted - 1) * apart);
            tiles<true>(M, x, ldx, rows, K, out + n, ldo, wanted, apart);
        }
        return;
    }
    long high = std::max<long>(NR, PANEL / K / NR * NR), even = K / Dot<X>::STEP * Dot<X>::STEP;
    for (long first = n0; first < n1; first += high) {
        long last = std::min(first + high, n1);
        for (long n = first; !plain && n < last; n++) {
            Row row = w.row<D>(n);
            X* to = panel + (n - first) * K;
            typename Dot<X>::reg end = last_piece<X>(row, even, K);
            auto block = [&](long& k, auto far) __attribute__((always_inline)) {
                const auto open = opened<X, decltype(far)::value>(row, k);
                for (const long stop = even - k > SPAN<X, Row> ? k + SPAN<X, Row> : even; k < stop; k += Dot<X>::STEP) {
                    typename Dot<X>::reg part = piece<X>(row, open, k);
                    std::memcpy(to + k, &part, sizeof part);
                }
            };
            for (long k = 0; k < even;)
                if (row.far(k)) block(k, std::true_type());
                else block(k, std::false_type());
            std::memcpy(to + even, &end, (K - even) * sizeof(X));
        }
        for (long m = 0; m < M; m += MR) {  // these rows of x stay in the first cache while the panel passes by
            for (long n = first; n < last; n += NR) {
                PlainRow<X> rows[NR];
                int wanted = int(std::min<long>(NR, last - n));
                for (int i = 0; i < NR; i++) {
                    long at = n + std::min(i, wanted - 1);
                    if constexpr (plain) rows[i] = w.row<D>(at);
                    else rows[i] = {panel + (at - first) * K};
                }
                tiles(std::min<long>(MR, M - m), x + m * ldx, ldx, rows, K, out + m * ldo + n, ldo, wanted);
            }
        }
    }
}

template <class X, class Out>
void by_format(int dtype, long M, const X* x, long ldx, const Matrix& w, long n0, long n1, Out* out, long ldo, X* panel) {
    switch (dtype) {
        case F32: return product_of<F32>(M, x, ldx, w, n0, n1, out, ldo, panel);
        case BF16: return product_of<BF16>(M, x, ldx, w, n0, n1, out, ldo, panel);
        case FP8: return product_of<FP8>(M, x, ldx, w, n0, n1, out, ldo, panel);
        default: return product_of<FP4>(M, x, ldx, w, n0, n1, out, ldo, panel);
    }
}

}  // namespace

void DSV4_ISA::product(int dtype, long M, const float* x, long ldx, const Matrix& w, long n0, long n1, float* out, long ldo,
                       float* panel) {
    by_format(dtype, M, x, ldx, w, n0, n1, out, ldo, panel);
}
void DSV4_ISA::product(int dtype, long M, const Product16* x, long ldx, const Matrix& w, long n0, long n1, bf16* out, long ldo,
                       Product16* panel) {
    by_format(dtype, M, x, ldx, w, n0, n1, out, ldo, panel);
}
