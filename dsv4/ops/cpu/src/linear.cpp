#include "calls.h"
#include "linear.h"

// x [M, K] -> y [M, N], both FP32 or both BF16; weights [N, K]
EXPORT(linear)
(const void* x, int is_bf16, long M, long K, const void* data, const void* scales, int dtype, long stride, long N, void* y) {
    Weight w{{data, static_cast<const uint8_t*>(scales), K, stride}, dtype, N};
    if (is_bf16) linear<bf16>(M, {{static_cast<const bf16*>(x), K, w, static_cast<bf16*>(y), N}});
    else linear<float>(M, {{static_cast<const float*>(x), K, w, static_cast<float*>(y), N}});
}
