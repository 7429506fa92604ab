#include "conv.h"

#include <algorithm>

namespace sparse_runtime {
namespace {

// Return the first element of part `index` of `count` nearly equal parts of [begin, end).
int64_t cut(int64_t begin, int64_t end, int64_t index, int64_t count) {
  return begin + (end - begin) * index / count;
}

}  // namespace

TileFunction find_tile(int64_t kind, int64_t group, int64_t vectors, int64_t rows,
                       int64_t stride_x) {
  if (kind == kQuantConv) return find_int8_tile(group, vectors, rows, stride_x);
  return pick_tile<Float32>(group, vectors, rows, stride_x);
}

namespace {

// Fill the borders of bands. A row that is a border of another band is copied as a whole.
void fill_band_borders(const Op& op, float* out, int64_t y, int64_t c) {
  const int64_t n = op.vectors;
  const int32_t *left = op.moves, *right = left + kLanes, *above = right + kLanes,
                *below = above + kLanes;
  float* plane = out + y * op.out_row + c * op.out_plane;
  const Vec fill = filler(op.fill);
  for (int64_t k = 0; k < op.halo; ++k) {
    store(plane - (k + 1) * kLanes, permute(load(plane + (n - 1 - k) * kLanes), left, fill));
    store(plane + (n + k) * kLanes, permute(load(plane + k * kLanes), right, fill));
  }
  const auto copy = [&](int64_t to, const int32_t* from) {
    for (int64_t i = -op.halo; i < n + op.halo; ++i) {
      store(plane + (to - y) * op.out_row + i * kLanes, permute(load(plane + i * kLanes), from, fill));
    }
  };
  if (y >= op.rows - op.pad_top) copy(y - op.rows, above);
  if (y < op.pad_bottom) copy(y + op.rows, below);
}

}  // namespace

namespace {

// Fill the rows above and below an image that has no bands. Where they are zero, they stay zero.
void fill_rows(const Op& op, float* out, int64_t y0, int64_t y1, int64_t c0, int64_t c1) {
  if (op.fill == 0) return;
  const Vec fill = filler(op.fill);
  const auto fill_row = [&](int64_t y) {
    for (int64_t c = c0; c < c1; ++c) {
      float* plane = out + y * op.out_row + c * op.out_plane;
      for (int64_t i = -op.halo; i < op.vectors + op.halo; ++i) store(plane + i * kLanes, fill);
    }
  };
  for (int64_t y = -op.fill_top; y0 == 0 && y < 0; ++y) fill_row(y);
  for (int64_t y = op.rows; y1 == op.rows && y < op.rows + op.fill_bottom; ++y) fill_row(y);
}

}  // namespace

void fill_halo(const Op& op, float* out, int64_t y0, int64_t y1, int64_t c0, int64_t c1) {
  fill_rows(op, out, y0, y1, c0, c1);
  if (op.halo == 0 && op.pad_top == 0 && op.pad_bottom == 0) return;
  const int64_t n = op.vectors;
  const Vec fill = filler(op.fill);
  for (int64_t y = y0; y < y1; ++y) {
    for (int64_t c = c0; c < c1; ++c) {
      if (op.moves) {
        fill_band_borders(op, out, y, c);
        continue;
      }
      float* plane = out + y * op.out_row + c * op.out_plane;
      for (int64_t k = 0; k < op.halo; ++k) {
        // The vector n vectors away holds the same columns, one lane away.
        store(plane - (k + 1) * kLanes, move_up(load(plane + (n - 1 - k) * kLanes), fill));
        store(plane + (n + k) * kLanes, move_down(load(plane + k * kLanes), fill));
      }
    }
  }
}

void sparse_conv(const Op& op, float* arena, int64_t p0, int64_t p1, int64_t y0, int64_t y1,
                 float* scratch) {
  const int64_t tiles_y = (y1 - y0 + op.tile_rows - 1) / op.tile_rows;
  const int64_t tiles_x = (op.vectors + op.tile_vectors - 1) / op.tile_vectors;
  float* out = arena + op.out;
  for (int64_t ty = 0; ty < tiles_y; ++ty) {
    const int64_t y = cut(y0, y1, ty, tiles_y), y_end = cut(y0, y1, ty + 1, tiles_y);
    for (int64_t tx = 0; tx < tiles_x; ++tx) {
      const int64_t x = cut(0, op.vectors, tx, tiles_x);
      const TileFunction run =
          find_tile(op.kind, op.group, cut(0, op.vectors, tx + 1, tiles_x) - x, y_end - y, op.stride_x);
      for (int64_t part = p0; part < p1; ++part) {
        run(op, part, arena + op.in + y * op.stride_y * op.in_row + x * op.stride_x * kLanes,
            out + y * op.out_row + x * kLanes,
            op.res < 0 ? nullptr : arena + op.res + y * op.res_row + x * kLanes,
            op.mask ? op.mask + y * op.mask_row + x * kLanes : nullptr, scratch);
      }
    }
    // Only the last part may end between the channels of a plane.
    const int64_t channels = channels_in_plane(op);
    fill_halo(op, out, y, y_end, op.part_begin[p0] / channels,
              (op.part_begin[p1] + channels - 1) / channels);
  }
}

namespace {

// Vectors of one row, or of two successive rows. Only rows begin <= r < end are stored.
struct DenseTile {
  int64_t in[kDenseVectors], out[kDenseVectors], res[kDenseVectors], mask[kDenseVectors];
  int64_t begin, end;
};

template <int NV>
using DenseSums = Vec[kDenseChannels][NV];

// Copy terms k0 <= k < k1 of the vectors of a tile to contiguous memory.
template <int NV>
void pack_inputs(const Op& op, const float* in, const DenseTile& tile, int64_t k0, int64_t k1,
          float* packed) {
  for (int64_t k = k0; k < k1; ++k, packed += NV * kLanes) {
    const float* source = in + op.offsets[k];
    for_each<NV>([&](auto i) SPARSE_INLINE { store(packed + i * kLanes, load(source + tile.in[i])); });
  }
}

// The same for rows that are computed in pairs: a term is the sum of two vectors, with a sign.
template <int NV>
void pack_input_pairs(const Op& op, const float* in, const DenseTile& tile, int64_t k0, int64_t k1,
                float* packed) {
  for (int64_t k = k0; k < k1; ++k, packed += NV * kLanes) {
    const float *source = in + op.offsets[3 * k], *other = in + op.offsets[3 * k + 1];
    const Vec sign = broadcast(float(op.offsets[3 * k + 2]));
    for_each<NV>([&](auto i) SPARSE_INLINE {
      store(packed + i * kLanes, load(source + tile.in[i]) + sign * load(other + tile.in[i]));
    });
  }
}

template <int NV>
inline SPARSE_INLINE void start(const Op& op, int64_t c, DenseSums<NV>& sum) {
  for_each<kDenseChannels>([&](auto j) SPARSE_INLINE {
    const Vec bias = broadcast(op.bias[std::min<int64_t>(c + j, op.channels - 1)]);
    for_each<NV>([&](auto i) SPARSE_INLINE { sum[j][i] = bias; });
  });
}

template <int NV>
inline SPARSE_INLINE void load_sums(const float* partial, DenseSums<NV>& sum) {
  for_each<kDenseChannels>([&](auto j) SPARSE_INLINE {
    for_each<NV>([&](auto i) SPARSE_INLINE { sum[j][i] = load(partial + (j * NV + i) * kLanes); });
  });
}

template <int NV>
inline SPARSE_INLINE void store_sums(const DenseSums<NV>& sum, float* partial) {
  for_each<kDenseChannels>([&](auto j) SPARSE_INLINE {
    for_each<NV>([&](auto i) SPARSE_INLINE { store(partial + (j * NV + i) * kLanes, sum[j][i]); });
  });
}

// Add terms k0 <= k < k1 of channels c .. c + 3.
template <int NV>
inline SPARSE_INLINE void multiply(const Op& op, int64_t c, int64_t k0, int64_t k1,
                                   const float* packed, DenseSums<NV>& sum) {
  const float* w = op.weights + (c / kDenseChannels * op.depth + k0) * kDenseChannels;
  for (int64_t k = k0; k < k1; ++k, w += kDenseChannels, packed += NV * kLanes) {
    // Load all inputs before the weights: sums, inputs and one weight fill the registers.
    Vec x[NV];
    for_each<NV>([&](auto i) SPARSE_INLINE { x[i] = load(packed + i * kLanes); });
    for_each<kDenseChannels>([&](auto j) SPARSE_INLINE {
      const Vec weight = broadcast(w[j]);
      for_each<NV>([&](auto i) SPARSE_INLINE { sum[j][i] += weight * x[i]; });
    });
  }
}

// Write the sums of row r of a tile.
template <int NV>
inline SPARSE_INLINE void finish(const Op& op, float* arena, const DenseTile& tile, int64_t r,
                                 int64_t c, const DenseSums<NV>& sum) {
  float* out = arena + op.out + r * op.out_row;
  const float* res = op.res < 0 ? nullptr : arena + op.res + r * op.res_row;
  const int32_t* mask = op.mask ? op.mask + r * op.mask_row : nullptr;
  for_each<kDenseChannels>([&](auto j) SPARSE_INLINE {
    if (c + j >= op.channels) return;
    for_each<NV>([&](auto i) SPARSE_INLINE {
      Vec v = sum[j][i];
      if (res) v += load(res + (c + j) * op.res_plane + tile.res[i]);
      if (op.activation == kRelu) v = maximum(v, Vec{});
      if (mask) v = keep(v, load_mask(mask + tile.mask[i]));
      store(out + (c + j) * op.out_plane + tile.out[i], v);
    });
  });
  if (op.activation > kRelu) {
    for (int64_t j = c; j < std::min<int64_t>(c + kDenseChannels, op.channels); ++j) {
      for (int64_t i = 0; i < NV; ++i) {
        activate_tile(op, out + j * op.out_plane + tile.out[i],
                      mask ? mask + tile.mask[i] : nullptr, 1, 1);
      }
    }
  }
}

// Replace `upper` by upper + sum, and write upper - sum to `lower`.
template <int NV>
inline SPARSE_INLINE void add_and_subtract(const DenseSums<NV>& sum, float* upper, float* lower) {
  for_each<kDenseChannels>([&](auto j) SPARSE_INLINE {
    for_each<NV>([&](auto i) SPARSE_INLINE {
      const int64_t at = (j * NV + i) * kLanes;
      const Vec v = load(upper + at);
      store(upper + at, v + sum[j][i]);
      store(lower + at, v - sum[j][i]);
    });
  });
}

// Call f(k0, k1, is_first, is_last) for nearly equal blocks of terms that fit `packed`.
template <typename F>
void for_blocks(int64_t begin, int64_t end, F f) {
  const int64_t blocks = (end - begin + kDenseDepth - 1) / kDenseDepth;
  for (int64_t b = 0; b < blocks; ++b) {
    f(cut(begin, end, b, blocks), cut(begin, end, b + 1, blocks), b == 0, b + 1 == blocks);
  }
}

template <int NV>
void single_tile(const Op& op, float* arena, int64_t p0, int64_t p1, const DenseTile& tile,
                 float* scratch) {
  float *packed = scratch, *partials = packed + kDenseDepth * kDenseVectors * kLanes;
  for_blocks(0, op.depth, [&](int64_t k0, int64_t k1, bool is_first, bool is_last) {
    pack_inputs<NV>(op, arena + op.in, tile, k0, k1, packed);
    float* partial = partials;
    for (int64_t c = op.part_begin[p0]; c < op.part_begin[p1]; c += kDenseChannels) {
      DenseSums<NV> sum;
      if (is_first) start<NV>(op, c, sum);
      else load_sums<NV>(partial, sum);
      multiply<NV>(op, c, k0, k1, packed, sum);
      if (is_last) finish<NV>(op, arena, tile, 0, c, sum);
      else store_sums<NV>(sum, partial);
      partial += kDenseChannels * NV * kLanes;
    }
  });
}

// Two rows of outputs y from four products m, Winograd's F(2, 3) down the rows (Lavin and Gray,
// "Fast Algorithms for Convolutional Neural Networks", CVPR 2016): y0 = m1 + m2 + m0 and
// y1 = m1 - m2 + m3. The products come in this order.
template <int NV>
void paired_tile(const Op& op, float* arena, int64_t p0, int64_t p1, const DenseTile& tile,
                 float* scratch) {
  constexpr int64_t tile_floats = kDenseChannels * NV * kLanes;
  const int64_t first = op.part_begin[p0], end = op.part_begin[p1];
  float *packed = scratch, *upper = packed + kDenseDepth * kDenseVectors * kLanes;
  float* lower = upper + (end - first + kDenseChannels) * kDenseVectors * kLanes;
  int64_t begin = 0;
  for (int product = 0; product < 4; begin += op.counts[product++]) {
    const int64_t row = product - 2;  // that the product completes
    if (row >= 0 && (row < tile.begin || row >= tile.end)) continue;
    float* const partials = product % 2 == 0 ? upper : lower;
    for_blocks(begin, begin + op.counts[product],
               [&](int64_t k0, int64_t k1, bool is_first, bool is_last) {
      pack_input_pairs<NV>(op, arena + op.in, tile, k0, k1, packed);
      for (int64_t c = first, at = 0; c < end; c += kDenseChannels, at += tile_floats) {
        DenseSums<NV> sum{};
        if (is_first && product == 0) start<NV>(op, c, sum);
        if (!is_first || product >= 2) load_sums<NV>(partials + at, sum);
        multiply<NV>(op, c, k0, k1, packed, sum);
        if (is_last && row >= 0) {
          finish<NV>(op, arena, tile, row, c, sum);
        } else if (is_last && product == 1) {
          add_and_subtract<NV>(sum, upper + at, lower + at);
        } else {
          store_sums<NV>(sum, partials + at);
        }
      }
    });
  }
}

// Compute tiles of `count` rows or pairs of rows from y on; rows begin <= r < end are stored.
void dense_rows(const Op& op, float* arena, int64_t p0, int64_t p1, int64_t y, int64_t count,
                int64_t begin, int64_t end, float* scratch) {
  const int64_t total = count * op.vectors;
  const int64_t tiles = (total + kDenseVectors - 1) / kDenseVectors;
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t first = cut(0, total, t, tiles), size = cut(0, total, t + 1, tiles) - first;
    DenseTile tile{};
    tile.begin = begin, tile.end = end;
    for (int64_t i = 0; i < size; ++i) {
      const int64_t row = y + (first + i) / op.vectors * op.tile_rows, x = (first + i) % op.vectors;
      tile.in[i] = row * op.stride_y * op.in_row + x * op.stride_x * kLanes;
      tile.out[i] = row * op.out_row + x * kLanes;
      tile.res[i] = row * op.res_row + x * kLanes;
      tile.mask[i] = row * op.mask_row + x * kLanes;
    }
    for_each<kDenseVectors>([&](auto i) SPARSE_INLINE {
      if (size != i + 1) return;
      (op.tile_rows == 1 ? single_tile<i + 1> : paired_tile<i + 1>)(op, arena, p0, p1, tile,
                                                                    scratch);
    });
  }
}

}  // namespace

void dense_conv(const Op& op, float* arena, int64_t p0, int64_t p1, int64_t y0, int64_t y1,
                float* scratch) {
  const int64_t count = (y1 - y0) / op.tile_rows;
  dense_rows(op, arena, p0, p1, y0, count, 0, op.tile_rows, scratch);
  if (count * op.tile_rows < y1 - y0) {  // only one row of the last pair is stored
    const int64_t above = y1 < op.rows ? 0 : 1;  // rows of the pair above row y1 - 1
    dense_rows(op, arena, p0, p1, y1 - 1 - above, 1, above, above + 1, scratch);
  }
  fill_halo(op, arena + op.out, y0, y1, op.part_begin[p0], op.part_begin[p1]);
}

int64_t scratch_floats(const Op& op) {
  if (op.kind != kSparseConv && op.kind != kDenseConv && op.kind != kQuantConv) return 0;
  // The size serves both kinds, because tuning tries both in the same memory.
  const int64_t channels = op.channels + kDenseChannels;  // whole groups
  return std::max(channels * kMaxTile, (kDenseDepth + 2 * channels) * kDenseVectors) * kLanes;
}

}  // namespace sparse_runtime
