// Attention between the pixels of windows of a map, and the operations that make maps and vectors of tokens.
#pragma once

#include "op.h"

namespace sparse_runtime {

// Rows y0 <= y < y1 of a map: pixels of another map in another order, and numbers added to all.
void tokens(const Op& op, float* arena, int64_t y0, int64_t y1);
// Channels c0 <= c < c1 of one pixel.
void token(const Op& op, const float* arena, float* out, int64_t c0, int64_t c1);

// The windows begin .. end - 1 of all heads, head by head. The input has the queries of all heads,
// then the keys, then the values.
// `scratch` has at least attention_scratch_floats(op) floats, aligned to a cache line.
void attention(const Op& op, float* arena, int64_t begin, int64_t end, float* scratch);
// Vectors that hold the tokens of a window.
int64_t window_vectors(const Op& op);
int64_t attention_scratch_floats(const Op& op);

}  // namespace sparse_runtime
