#include "attention.h"

#include <algorithm>
#include <cmath>
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
  float *queries, *scores;  // vectors of a tile: [depth][NV]; [tokens][NV]
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
    scores = take(op.num_tokens * kDenseVectors * kLanes);
  }
};

void pack_keys(const Op& op, const float* in, const int32_t* places, float* packed) {
  for (int64_t j = 0; j < whole_groups(op.num_tokens); j += kDenseChannels) {
    for (int64_t c = 0; c < op.depth; ++c) {
      for (int64_t k = j; k < j + kDenseChannels; ++k) {
        *packed++ = k < op.num_tokens ? in[c * op.in_plane + places[k]] : 0.0f;
      }
    }
  }
}

void pack_values(const Op& op, const float* in, const int32_t* places, float* packed) {
  for (int64_t c = 0; c < whole_groups(op.depth); c += kDenseChannels) {
    for (int64_t k = c; k < c + kDenseChannels; ++k) {
      float* to = packed + (k - c);
      for (int64_t j = 0; j < op.num_tokens; ++j, to += kDenseChannels) {
        *to = k < op.depth ? in[k * op.in_plane + places[j]] : 0.0f;
      }
    }
    packed += op.num_tokens * kDenseChannels;
  }
}

// Divide the columns of a matrix by their lengths, as F.normalize does, and multiply by `scale`.
void normalize(float* matrix, int64_t rows, int64_t columns, float scale) {
  float factors[kDenseVectors * kLanes] = {};
  for (int64_t r = 0; r < rows; ++r) {
    const float* row = matrix + r * columns;
    for (int64_t c = 0; c < columns; ++c) factors[c] += row[c] * row[c];
  }
  for (int64_t c = 0; c < columns; ++c) {
    factors[c] = scale / std::max(std::sqrt(factors[c]), 1e-12f);
  }
  for (int64_t r = 0; r < rows; ++r) {
    float* row = matrix + r * columns;
    for (int64_t c = 0; c < columns; ++c) row[c] *= factors[c];
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

// One head of one window.
struct Window {
  const float *in, *bias;    // `bias` may be null
  float* out;
  const int32_t *from, *to;  // places of the tokens in a channel of the input and of the output
  float scale;
};

// Attend from the queries in the vectors first .. first + NV - 1 of a window.
template <int NV>
void attend(const Op& op, const Window& window, int64_t first, const Head& head) {
  constexpr int64_t kTile = NV * kLanes;
  const int64_t size = window_vectors(op) * kLanes;
  const int64_t count = std::min(kTile, op.num_tokens - first * kLanes);
  const int32_t *from = window.from + first * kLanes, *to = window.to + first * kLanes;
  const float scale = op.weights ? 1.0f : window.scale;  // the length of a query does not count
  for (int64_t c = 0; c < op.depth; ++c) {
    const float* in = window.in + c * op.in_plane;
    float* query = head.queries + c * kTile;
    for (int64_t i = 0; i < count; ++i) query[i] = in[from[i]] * scale;
    for (int64_t i = count; i < kTile; ++i) query[i] = 0;
  }
  if (op.weights) normalize(head.queries, op.depth, kTile, window.scale);
  Vec most[NV], total[NV]{};
  for_each<NV>([&](auto i) SPARSE_INLINE {
    most[i] = broadcast(-std::numeric_limits<float>::infinity());
  });
  for (int64_t j = 0; j < op.num_tokens; j += kDenseChannels) {
    Vec sum[kDenseChannels][NV]{};
    weigh<NV>(head.keys + j * op.depth, head.queries, op.depth, sum);
    for_each<kDenseChannels>([&](auto k) SPARSE_INLINE {
      if (j + k >= op.num_tokens) return;
      for_each<NV>([&](auto i) SPARSE_INLINE {
        Vec score = sum[k][i];
        if (window.bias) score += load(window.bias + (j + k) * size + (first + i) * kLanes);
        store(head.scores + ((j + k) * NV + i) * kLanes, score);
        most[i] = larger(score, most[i]);
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
      float *mixed = head.queries, *out = window.out + (c + k) * op.out_plane;
      for_each<NV>([&](auto i) SPARSE_INLINE { store(mixed + i * kLanes, sum[k][i] * total[i]); });
      for (int64_t i = 0; i < count; ++i) out[to[i]] = mixed[i];
    });
  }
}

}  // namespace

int64_t window_vectors(const Op& op) { return (op.num_tokens + kLanes - 1) / kLanes; }

void attention(const Op& op, float* arena, int64_t begin, int64_t end, float* scratch) {
  const Head head(op, scratch);
  const int64_t vectors = window_vectors(op), size = vectors * kLanes;
  const int64_t tiles = (vectors + kDenseVectors - 1) / kDenseVectors;
  for (int64_t n = begin; n < end; ++n) {
    const int64_t h = n / op.num_windows, w = n % op.num_windows;
    Window window{};
    window.in = arena + op.in + h * op.depth * op.in_plane;
    window.out = arena + op.out + h * op.depth * op.out_plane;
    window.from = op.offsets + w * size;
    window.to = window.from + op.num_windows * size;
    window.scale = float(op.score_scale) * (op.weights ? op.weights[h] : 1.0f);
    if (op.bias) window.bias = op.bias + (op.counts[w] * op.heads + h) * op.num_tokens * size;
    pack_keys(op, window.in + op.channels * op.in_plane, window.from, head.keys);
    pack_values(op, window.in + 2 * op.channels * op.in_plane, window.from, head.values);
    if (op.weights) {
      for (int64_t j = 0; j < op.num_tokens; j += kDenseChannels) {
        normalize(head.keys + j * op.depth, op.depth, kDenseChannels, 1.0f);
      }
    }
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t first = vectors * t / tiles, count = vectors * (t + 1) / tiles - first;
      for_each<kDenseVectors>([&](auto i) SPARSE_INLINE {
        if (count == i + 1) attend<i + 1>(op, window, first, head);
      });
    }
  }
}

int64_t attention_scratch_floats(const Op& op) {
  return op.kind == kAttention ? Head(op, nullptr).floats : 0;
}

}  // namespace sparse_runtime
