// All operations but convolutions: input, output, pooling, scaling, linear layers, change of layout.
#pragma once

#include "op.h"

namespace sparse_runtime {

// Rows y0 <= y < y1 of the output; `image` is (in_channels, height, width), C-contiguous.
void read_input(const Op& op, const float* image, float* arena, int64_t y0, int64_t y1);
void repack(const Op& op, float* arena, int64_t y0, int64_t y1);
// The reverse of read_input: writes all rows y0 <= y < y1 to `image`.
void write_output(const Op& op, const float* arena, float* image, int64_t y0, int64_t y1);
// Multiplies every channel by its element of a vector.
void scale(const Op& op, float* arena, int64_t y0, int64_t y1);
void max_pool(const Op& op, float* arena, int64_t y0, int64_t y1);

// Channels c0 <= c < c1 of a vector, whose elements are contiguous at `out`.
void mean_pool(const Op& op, const float* arena, float* out, int64_t c0, int64_t c1);
void linear(const Op& op, const float* arena, float* out, int64_t c0, int64_t c1);

}  // namespace sparse_runtime
