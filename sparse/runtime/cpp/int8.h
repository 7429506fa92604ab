// Operations of networks in int8: unsigned bytes times signed weights, summed exactly in 32 bits.
#pragma once

#include "op.h"

namespace sparse_runtime {

// Whether the processor adds up the products of 4 bytes in one instruction, and may do so.
bool int8_is_fast();
// Forbids this instruction, for tests: networks that exist compute with others from then on.
extern bool slow_int8;

// These compute output rows y0 <= y < y1 of all channels, borders included.
void quant_input(const Op& op, const float* image, float* arena, int64_t y0, int64_t y1);
void quant_max_pool(const Op& op, float* arena, int64_t y0, int64_t y1);
void quant_lookup(const Op& op, float* arena, int64_t y0, int64_t y1);
// The same of planes c0 <= c < c1.
void quantize(const Op& op, float* arena, int64_t c0, int64_t c1, int64_t y0, int64_t y1);

// Compute planes c0 <= c < c1 of a vector of bytes.
void quant_mean_pool(const Op& op, const float* arena, float* out, int64_t c0, int64_t c1);
// Compute channels c0 <= c < c1: bytes, or float32 without a rescale.
void quant_linear(const Op& op, const float* arena, float* out, int64_t c0, int64_t c1);
// Compute all bytes of a vector.
void quantize_vector(const Op& op, float* arena);

}  // namespace sparse_runtime
