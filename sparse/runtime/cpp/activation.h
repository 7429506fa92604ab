// Activation functions, applied in place to what an operation has written.
#pragma once

#include "op.h"

namespace sparse_runtime {

// Apply the activation of an operation to a tile of its output: rows of successive vectors. Lanes
// that the mask excludes become zero again.
void activate_tile(const Op& op, float* out, const int32_t* mask, int64_t rows, int64_t vectors);

// Apply an activation to successive numbers, aligned or not.
void activate(int64_t activation, float* values, int64_t count);

}  // namespace sparse_runtime
