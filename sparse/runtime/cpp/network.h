// What network.cpp offers to Python, through ctypes, and to plan.cpp.
#pragma once

#include <vector>

#include "op.h"

namespace sparse_runtime {

// Rows (or channels) of an operation, in the order of the execution plan.
struct Piece {
  int64_t op, begin, end;
};

// Floats that a thread needs besides the activations.
int64_t thread_floats(const std::vector<Op>& ops);

}  // namespace sparse_runtime

extern "C" {

int64_t sparse_runtime_lanes();
int64_t sparse_runtime_registers();
int64_t sparse_runtime_max_tile(int64_t group);
int64_t sparse_runtime_op_size();
int64_t sparse_runtime_plan_version();
// The rows of an operation, or its channels if its output has no rows.
int64_t sparse_runtime_extent(const sparse_runtime::Op* op);

// The caller keeps the tables to which the operations point. Null: no memory.
void* sparse_runtime_create(const sparse_runtime::Op* ops, int64_t num_ops,
                            const sparse_runtime::Piece* pieces, int64_t num_pieces,
                            int64_t arena_floats, int64_t threads);
// The number of threads that the system has started, with the caller's.
int64_t sparse_runtime_threads(const void* network);
void sparse_runtime_destroy(void* network);
// Return 0, or 1 if memory ran out.
int64_t sparse_runtime_run(void* network, const float* images, int64_t image_size, float* logits,
                           int64_t logits_size, int64_t num_images);
double sparse_runtime_time(void* network, const sparse_runtime::Op* op, int64_t repetitions);
void sparse_runtime_profile(void* network, const float* image, float* logits, double* seconds);

}  // extern "C"
