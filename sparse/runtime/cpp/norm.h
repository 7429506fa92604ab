// LayerNorm over channels.
#pragma once

#include "op.h"

namespace sparse_runtime {

// Vectors begin_part <= i < end_part of rows y0 <= y < y1 of a map; see `Op::num_parts`.
void layer_norm(const Op& op, float* arena, int64_t begin_part, int64_t end_part, int64_t y0,
                int64_t y1);
// All channels of a vector.
void vector_norm(const Op& op, const float* arena, float* out);

}  // namespace sparse_runtime
