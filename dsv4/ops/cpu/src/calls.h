// The functions of this library that others of it call, as Python does: addresses and numbers.
#pragma once

#include "simd.h"

#define CALL(name) DSV4_NAME(name, DSV4_ISA)

// A weight among arguments, and as these.
#define WEIGHT(name) \
    const void *name##_data, const void *name##_scales, int name##_dtype, long name##_rows, long name##_columns
#define GIVE(w) (w).data, (w).scales, int((w).dtype), (w).rows, (w).columns

EXPORT(linear)
(const void* x, int is_bf16, long M, long K, const void* data, const void* scales, int dtype, long stride, long N, void* y);

EXPORT(project_in)
(const void* x, int is_bf16, long n, WEIGHT(wq_a), const float* q_gain, WEIGHT(wq_b), WEIGHT(wkv), const float* kv_gain, long H,
 float eps, const float* turn, long pairs, void* qr, void* q, void* kv, void* row);

EXPORT(project_out)
(void* o, int is_bf16, long n, long H, long D, const float* turn, long pairs, WEIGHT(wo_a), long G, WEIGHT(wo_b), void* low,
 void* y);

EXPORT(compressor_rows)
(const void* x, int is_bf16, long n, long M, const float* wkv, const float* wgate, long C, const float* ape, long r,
 const int64_t* positions, float* out);

EXPORT(experts)
(const void* x, int is_bf16, long n, long M, long I, const int64_t* chosen, const float* weights, long k, long experts,
 const void* gate, const void* gate_scales, const void* up, const void* up_scales, const void* down, const void* down_scales,
 int dtype, long step, long offset, long down_step, float limit, float* out);

EXPORT(gate)
(const void* x, int is_bf16, long n, long M, const void* weight, int weight_is_bf16, long stride, long X, const float* bias,
 const int64_t* given, long k, float scale, float* scores, int64_t* chosen, float* weights);

EXPORT(hyper_enter)
(const void* x, int is_bf16, long n, int N, long M, const float* fn, const float* base, const float* scale, const float* gain,
 int iters, float eps, float norm_eps, void* out, float* post, float* comb, float* kept);

EXPORT(hyper_write)
(const void* x, const void* y, int is_bf16, long n, int N, long M, const float* post, const float* comb, void* out);

EXPORT(head_collapse)
(const void* x, int is_bf16, long n, int N, long M, const float* fn, const float* base, const float* scale, float eps,
 float norm_eps, void* out, float* kept);

EXPORT(sparse_attention)
(const void* q, int is_bf16, long n, long H, long D, const int64_t* window, const int64_t* entries, const void* start,
 const void* stop, const void* entry_start, const void* entry_stop, const void* chosen, long K, const float* sink, float scale,
 void* out, float* lse);

EXPORT(index_scores_topk)
(const void* q, int is_bf16, long n, long H, long D, const float* weights, const int64_t* keys, const int64_t* start,
 const int64_t* stop, long k, int64_t* out);

EXPORT(rotate)
(const void* x, int is_bf16, long rows, long heads, long D, const float* turn, long pairs, int conjugate, void* out);

EXPORT(compress)
(const float* values, long value_stride, const float* scores, long score_stride, long R, const int64_t* first_row,
 const uint8_t* has_previous, long count, long r, int overlap, long d, const float* gain, float norm_eps, const float* turn,
 long pairs, int conjugate, int is_bf16, void* out);

EXPORT(pack_rows)
(const void* rows, int is_bf16, long n, long width, long block, long tail, long row_bytes, int fp4, int fp32_scales, int rotated,
 uint8_t* out);

EXPORT(unpack_rows)
(const uint8_t* data, long n, long width, long block, long tail, long row_bytes, int fp4, int fp32_scales, int is_bf16, void* out);
