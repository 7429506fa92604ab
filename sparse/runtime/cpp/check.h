// Operations of a plan that may come from anybody: everything that they would touch is checked.
#pragma once

#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>

#include "op.h"

namespace sparse_runtime {

// What does not fit, in words.
struct Damage : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Limits {
  int64_t arena, image, output;                 // floats
  std::map<const void*, int64_t> table_bytes;  // by the start of the table
};

// Check an operation whose pointers are null or point to tables of `limits`. The kernels then read
// and write only the arena, the image, the output and the tables, on any threads, with the scratch
// memory of scratch_floats and attention_scratch_floats. The numbers that they compute are not
// checked.
//
// Throws Damage. An operation of a kind that is not known here is refused.
void check_op(const Op& op, const Limits& limits);

}  // namespace sparse_runtime
