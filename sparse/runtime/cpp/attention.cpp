#include "attention.h"

#include <algorithm>
#include <limits>

#include "conv.h"
#include "simd.h"

namespace sparse_runtime {

void tokens(const Op& op, float* arena, int64_t y0, int64_t y1) {
  const int64_t size = op.vectors * kLanes;
  for (int64_t y = y0; y < y1; ++y) {
    for (int64_t c = 0; c < op.channels; ++c) {
      const float* in = arena + op.in + c * op.in_plane;
      const float* added = op.weights + (c * op.rows + y) * size;
      float* out = arena + op.out + y * op.out_row + c * op.out_plane;
      for (int64_t i = 0; i < size; i += kLanes) {
        store(out + i, gather(in, load_mask(op.offsets + y * size + i)) + load(added + i));
      }
    }
  }
  fill_halo(op, arena + op.out, y0, y1, 0, op.channels);
}

void token(const Op& op, const float* arena, float* out, int64_t c0, int64_t c1) {
  for (int64_t c = c0; c < c1; ++c) out[c] = arena[op.in + c * op.in_plane];
}

namespace {

int64_t whole_groups(int64_t count) {
  return (count + kDenseChannels - 1) / kDenseChannels * kDenseChannels;
}

// The arrays of one head. Each begins at a cache line.
struct Head {
  float *keys, *values;     // [tokens / 4][depth][4]; [depth / 4][tokens][4]
  float *queries, *scores;  // vectors of a tile: [depth][NV]; [tokens, rounded up][NV]
  int64_t floats = 0;

  Head(const Op& op, float* scratch) {
    const auto take = [&](int64_t count) {
      float* const taken = scratch ? scratch + floats : nullptr;
      floats += (count + kLineFloats - 1) / kLineFloats * kLineFloats;
      return taken;
    };
    keys = take(whole_groups(op.num_tokens) * op.depth);
    values = take(whole_groups(op.depth) * op.num_tokens);
    queries = take(op.depth * kDenseVectors * kLanes);
    scores = take(whole_groups(op.num_tokens) * kDenseVectors * kLanes);
  }
};

void pack_keys(const Op& op, const float* in, float* packed) {
  for (int64_t j = 0; j < whole_groups(op.num_tokens); j += kDenseChannels) {
    for (int64_t c = 0; c < op.depth; ++c) {
      for (int64_t k = j; k < j + kDenseChannels; ++k) {
        *packed++ = k < op.num_tokens ? in[c * op.in_plane + op.offsets[k]] : 0.0f;
      }
    }
  }
}

void pack_values(const Op& op, const float* in, float* packed) {
  for (int64_t c = 0; c < whole_groups(op.depth); c += kDenseChannels) {
    for (int64_t k = c; k < c + kDenseChannels; ++k) {
      float* to = packed + (k - c);
      for (int64_t j = 0; j < op.num_tokens; ++j, to += kDenseChannels) {
        *to = k < op.depth ? in[k * op.in_plane + op.offsets[j]] : 0.0f;
      }
    }
    packed += op.num_tokens * kDenseChannels;
  }
}

// Four sums of `depth` vectors, weighted.
template <int NV>
inline SPARSE_INLINE void weigh(const float* weights, const float* vectors, int64_t depth,
                                Vec (&sum)[kDenseChannels][NV]) {
  for (int64_t k = 0; k < depth; ++k, weights += kDenseChannels, vectors += NV * kLanes) {
    Vec x[NV];
    for_each<NV>([&](auto i) SPARSE_INLINE { x[i] = load(vectors + i * kLanes); });
    for_each<kDenseChannels>([&](auto j) SPARSE_INLINE {
      const Vec weight = broadcast(weights[j]);
      for_each<NV>([&](auto i) SPARSE_INLINE { sum[j][i] += weight * x[i]; });
    });
  }
}

// Attend from the queries in the vectors first .. first + NV - 1 of the map, counted row by row.
template <int NV>
void attend(const Op& op, const float* in, float* out, int64_t first, const Head& head) {
  int64_t from[NV], to[NV];
  Mask valid[NV];
  for (int64_t i = 0; i < NV; ++i) {
    const int64_t y = (first + i) / op.vectors, x = (first + i) % op.vectors;
    from[i] = y * op.in_row + x * kLanes;
    to[i] = y * op.out_row + x * kLanes;
    valid[i] = op.mask ? load_mask(op.mask + y * op.mask_row + x * kLanes) : ~Mask{};
  }
  const Vec scale = broadcast(float(op.score_scale));
  for (int64_t c = 0; c < op.depth; ++c) {
    for_each<NV>([&](auto i) SPARSE_INLINE {
      store(head.queries + (c * NV + i) * kLanes, load(in + c * op.in_plane + from[i]) * scale);
    });
  }
  Vec most[NV], total[NV]{};
  for_each<NV>([&](auto i) SPARSE_INLINE {
    most[i] = broadcast(-std::numeric_limits<float>::infinity());
  });
  for (int64_t j = 0; j < op.num_tokens; j += kDenseChannels) {
    Vec sum[kDenseChannels][NV]{};
    weigh<NV>(head.keys + j * op.depth, head.queries, op.depth, sum);
    for_each<kDenseChannels>([&](auto k) SPARSE_INLINE {
      for_each<NV>([&](auto i) SPARSE_INLINE {
        store(head.scores + ((j + k) * NV + i) * kLanes, sum[k][i]);
        if (j + k < op.num_tokens) most[i] = larger(sum[k][i], most[i]);
      });
    });
  }
  for (int64_t j = 0; j < op.num_tokens; ++j) {
    for_each<NV>([&](auto i) SPARSE_INLINE {
      float* score = head.scores + (j * NV + i) * kLanes;
      const Vec share = exponential(load(score) - most[i]);
      total[i] += share;
      store(score, share);
    });
  }
  for_each<NV>([&](auto i) SPARSE_INLINE { total[i] = broadcast(1.0f) / total[i]; });
  for (int64_t c = 0; c < op.depth; c += kDenseChannels) {
    Vec sum[kDenseChannels][NV]{};
    weigh<NV>(head.values + c * op.num_tokens, head.scores, op.num_tokens, sum);
    for_each<kDenseChannels>([&](auto k) SPARSE_INLINE {
      if (c + k >= op.depth) return;
      for_each<NV>([&](auto i) SPARSE_INLINE {
        store(out + (c + k) * op.out_plane + to[i], keep(sum[k][i] * total[i], valid[i]));
      });
    });
  }
}

}  // namespace

void attention(const Op& op, float* arena, int64_t h0, int64_t h1, float* scratch) {
  const Head head(op, scratch);
  const int64_t vectors = op.rows * op.vectors;
  const int64_t tiles = (vectors + kDenseVectors - 1) / kDenseVectors;
  for (int64_t h = h0; h < h1; ++h) {
    const float* in = arena + op.in + h * op.depth * op.in_plane;
    float* out = arena + op.out + h * op.depth * op.out_plane;
    pack_keys(op, in + op.channels * op.in_plane, head.keys);
    pack_values(op, in + 2 * op.channels * op.in_plane, head.values);
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t first = vectors * t / tiles, size = vectors * (t + 1) / tiles - first;
      for_each<kDenseVectors>([&](auto i) SPARSE_INLINE {
        if (size == i + 1) attend<i + 1>(op, in, out, first, head);
      });
    }
  }
}

int64_t attention_scratch_floats(const Op& op) {
  return op.kind == kAttention ? Head(op, nullptr).floats : 0;
}

}  // namespace sparse_runtime
