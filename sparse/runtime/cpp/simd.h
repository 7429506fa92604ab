// Vectors of kLanes floats, written with the vector extensions of GCC and Clang: one source serves
// AVX2, AVX-512, NEON and machines without any of them. The builder sets SPARSE_LANES.
#pragma once

#include <cstdint>

#ifndef SPARSE_LANES
#error "SPARSE_LANES must be 4, 8 or 16"
#endif

namespace sparse_runtime {

constexpr int kLanes = SPARSE_LANES;

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t Mask __attribute__((vector_size(kLanes * 4)));

inline Vec load(const float* p) { return *reinterpret_cast<const Vec*>(p); }
inline void store(float* p, Vec v) { *reinterpret_cast<Vec*>(p) = v; }
inline Mask load_mask(const int32_t* p) { return *reinterpret_cast<const Mask*>(p); }
inline Vec broadcast(float x) { return x - Vec{}; }
// A NaN in `a` stays, as torch has it.
inline Vec maximum(Vec a, Vec b) { return b > a ? b : a; }

// Zero the lanes where the mask is 0; the others of the mask are all ones.
inline Vec keep(Vec v, Mask m) { return reinterpret_cast<Vec>(reinterpret_cast<Mask>(v) & m); }

// Move every lane up by `shift` places (down if negative), filling with zeros.
inline Vec shift_lanes(Vec v, int64_t shift) {
  Vec out{};
  for (int lane = 0; lane < kLanes; ++lane) {
    const int64_t source = lane - shift;
    if (source >= 0 && source < kLanes) out[lane] = v[source];
  }
  return out;
}

}  // namespace sparse_runtime
