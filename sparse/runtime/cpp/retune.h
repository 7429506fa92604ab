// Tuning without Python: other ways to compute a convolution of a plan, as tune.py tries them.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "op.h"

namespace sparse_runtime {

// Tables of a convolution; op.h explains them.
struct ConvTables {
  std::vector<int32_t> row_channel, counts, offsets;
  std::vector<int64_t> part_stream;
  std::vector<float> connections, weights;
};

// A way to compute an operation, and the tables that it does not share with the plan.
struct Way {
  Op op;
  std::shared_ptr<const ConvTables> tables;
};

// Return the ways to compute a checked operation, first the given one. It is the only one if the
// operation is no convolution, or has the tables of rows in pairs, from which no others follow.
std::vector<Way> ways(const Op& op);

}  // namespace sparse_runtime
