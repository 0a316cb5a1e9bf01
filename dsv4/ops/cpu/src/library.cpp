// What the library says of itself: which instructions this machine has, and what it was built from.
#include "simd.h"

#if !defined(__AVX512F__)  // once, in the object that every machine can run

extern "C" __attribute__((visibility("default"))) int dsv4_best_isa() {
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return -1;
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512dq") ||
        !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512vnni"))
        return 0;
    return __builtin_cpu_supports("avx512bf16") ? 2 : 1;
}

extern "C" __attribute__((visibility("default"))) const char* dsv4_digest() { return DSV4_DIGEST; }

#endif
