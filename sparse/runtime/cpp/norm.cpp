#include "norm.h"

#include <cmath>

#include "conv.h"
#include "simd.h"

namespace sparse_runtime {
namespace {

constexpr int kNormVectors = 4;  // vectors whose sums are kept at a time

inline Vec square_root(Vec v) {
  for (int lane = 0; lane < kLanes; ++lane) v[lane] = std::sqrt(v[lane]);
  return v;
}

// Normalize NV successive vectors. The mean comes first: the variance would else lose its digits.
template <int NV>
void norm_vectors(const Op& op, const float* in, float* out, const int32_t* mask) {
  const Vec count = broadcast(float(op.channels));
  Vec mean[NV]{}, variance[NV]{}, scale[NV];
  for (int64_t c = 0; c < op.channels; ++c) {
    const float* p = in + c * op.in_plane;
    for_each<NV>([&](auto i) SPARSE_INLINE { mean[i] += load(p + i * kLanes); });
  }
  for_each<NV>([&](auto i) SPARSE_INLINE { mean[i] /= count; });
  for (int64_t c = 0; c < op.channels; ++c) {
    const float* p = in + c * op.in_plane;
    for_each<NV>([&](auto i) SPARSE_INLINE {
      const Vec d = load(p + i * kLanes) - mean[i];
      variance[i] += d * d;
    });
  }
  for_each<NV>([&](auto i) SPARSE_INLINE {
    scale[i] = broadcast(1.0f) / square_root(variance[i] / count + broadcast(float(op.eps)));
  });
  for (int64_t c = 0; c < op.channels; ++c) {
    const float* p = in + c * op.in_plane;
    const Vec weight = broadcast(op.weights[c]), bias = broadcast(op.bias[c]);
    for_each<NV>([&](auto i) SPARSE_INLINE {
      Vec v = (load(p + i * kLanes) - mean[i]) * scale[i] * weight + bias;
      if (mask) v = keep(v, load_mask(mask + i * kLanes));
      store(out + c * op.out_plane + i * kLanes, v);
    });
  }
}

}  // namespace

void layer_norm(const Op& op, float* arena, int64_t begin_part, int64_t end_part, int64_t y0,
                int64_t y1) {
  const int64_t x0 = op.vectors * begin_part / op.num_parts;
  const int64_t x1 = op.vectors * end_part / op.num_parts;
  for (int64_t y = y0; y < y1; ++y) {
    const float* in = arena + op.in + y * op.in_row;
    float* out = arena + op.out + y * op.out_row;
    const int32_t* mask = op.mask ? op.mask + y * op.mask_row : nullptr;
    int64_t x = x0;
    const auto advance = [&](auto size) {
      for (; x + size <= x1; x += size) {
        norm_vectors<size>(op, in + x * kLanes, out + x * kLanes,
                           mask ? mask + x * kLanes : nullptr);
      }
    };
    advance(std::integral_constant<int, kNormVectors>());
    advance(std::integral_constant<int, 1>());
  }
  fill_halo(op, arena + op.out, y0, y1, 0, op.channels);
}

void vector_norm(const Op& op, const float* arena, float* out) {
  const float* in = arena + op.in;
  float mean = 0, variance = 0;
  for (int64_t c = 0; c < op.channels; ++c) mean += in[c];
  mean /= float(op.channels);
  for (int64_t c = 0; c < op.channels; ++c) variance += (in[c] - mean) * (in[c] - mean);
  const float scale = 1 / std::sqrt(variance / float(op.channels) + float(op.eps));
  for (int64_t c = 0; c < op.channels; ++c) {
    out[c] = (in[c] - mean) * scale * op.weights[c] + op.bias[c];
  }
}

}  // namespace sparse_runtime
