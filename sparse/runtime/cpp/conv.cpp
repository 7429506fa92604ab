#include "conv.h"

#include <algorithm>

namespace sparse_runtime {
namespace {

template <int P, int VY, int SX, int... X>
TileFunction pick(int64_t vectors, std::integer_sequence<int, X...>) {
  static constexpr TileFunction table[] = {&SparseTile<P, X + 1, VY, SX>::run..., nullptr};
  return vectors >= 1 && vectors <= int64_t(sizeof...(X)) ? table[vectors - 1] : nullptr;
}

template <int P, int VY, int SX>
TileFunction pick(int64_t vectors) {
  constexpr int most = VY == 1 ? std::min(8, max_tile(P)) : max_tile(P) / VY;
  return pick<P, VY, SX>(vectors, std::make_integer_sequence<int, most>());
}

template <int P, int SX>
TileFunction pick(int64_t vectors, int64_t rows) {
  switch (rows) {
    case 1: return pick<P, 1, SX>(vectors);
    case 2: return pick<P, 2, SX>(vectors);
    case 3: return pick<P, 3, SX>(vectors);
    case 4: return pick<P, 4, SX>(vectors);
    case 5: return pick<P, 5, SX>(vectors);
    case 6: return pick<P, 6, SX>(vectors);
    case 7: return pick<P, 7, SX>(vectors);
    default: return nullptr;
  }
}

// Part `index` of `count` nearly equal parts of [begin, end): its first element.
int64_t cut(int64_t begin, int64_t end, int64_t index, int64_t count) {
  return begin + (end - begin) * index / count;
}

}  // namespace

TileFunction find_tile(int64_t group, int64_t vectors, int64_t rows, int64_t stride_x) {
  if (stride_x == 2) return group == 1 ? pick<1, 2>(vectors, rows) : nullptr;
  if (stride_x != 1) return nullptr;
  switch (group) {
    case 1: return pick<1, 1>(vectors, rows);
    case 2: return pick<2, 1>(vectors, rows);
    case 4: return pick<4, 1>(vectors, rows);
    default: return nullptr;
  }
}

namespace {

// The borders of bands; rows that other bands continue are copied whole.
void fill_band_borders(const Op& op, float* out, int64_t y, int64_t c) {
  const int64_t n = op.vectors;
  const int32_t *left = op.moves, *right = left + kLanes, *above = right + kLanes,
                *below = above + kLanes;
  float* plane = out + y * op.out_row + c * op.out_plane;
  for (int64_t k = 0; k < op.halo; ++k) {
    store(plane - (k + 1) * kLanes, permute(load(plane + (n - 1 - k) * kLanes), left));
    store(plane + (n + k) * kLanes, permute(load(plane + k * kLanes), right));
  }
  const auto copy = [&](int64_t to, const int32_t* from) {
    for (int64_t i = -op.halo; i < n + op.halo; ++i) {
      store(plane + (to - y) * op.out_row + i * kLanes, permute(load(plane + i * kLanes), from));
    }
  };
  if (y >= op.rows - op.pad_top) copy(y - op.rows, above);
  if (y < op.pad_bottom) copy(y + op.rows, below);
}

}  // namespace

void fill_halo(const Op& op, float* out, int64_t y0, int64_t y1, int64_t c0, int64_t c1) {
  if (op.halo == 0 && op.pad_top == 0 && op.pad_bottom == 0) return;
  const int64_t n = op.vectors;
  for (int64_t y = y0; y < y1; ++y) {
    for (int64_t c = c0; c < c1; ++c) {
      if (op.moves) {
        fill_band_borders(op, out, y, c);
        continue;
      }
      float* plane = out + y * op.out_row + c * op.out_plane;
      for (int64_t k = 0; k < op.halo; ++k) {
        // What lies n vectors away is the same column in the neighboring lane.
        store(plane - (k + 1) * kLanes, move_up(load(plane + (n - 1 - k) * kLanes)));
        store(plane + (n + k) * kLanes, move_down(load(plane + k * kLanes)));
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
          find_tile(op.group, cut(0, op.vectors, tx + 1, tiles_x) - x, y_end - y, op.stride_x);
      for (int64_t part = p0; part < p1; ++part) {
        run(op, part, arena + op.in + y * op.stride_y * op.in_row + x * op.stride_x * kLanes,
            out + y * op.out_row + x * kLanes,
            op.res < 0 ? nullptr : arena + op.res + y * op.res_row + x * kLanes,
            op.mask ? op.mask + y * op.mask_row + x * kLanes : nullptr, scratch);
      }
    }
    fill_halo(op, out, y, y_end, op.part_begin[p0], op.part_begin[p1]);
  }
}

namespace {

struct DenseTile {
  int64_t in[kDenseVectors], out[kDenseVectors], res[kDenseVectors], mask[kDenseVectors];
};

template <int NV>
void pack(const Op& op, const float* in, const DenseTile& tile, int64_t k0, int64_t k1,
          float* packed) {
  for (int64_t k = k0; k < k1; ++k, packed += NV * kLanes) {
    const float* source = in + op.offsets[k];
    for_each<NV>([&](auto i) SPARSE_INLINE { store(packed + i * kLanes, load(source + tile.in[i])); });
  }
}

// Four output channels by NV vectors, terms k0 <= k < k1.
template <int NV>
void multiply(const Op& op, const DenseTile& tile, int64_t c, int64_t k0, int64_t k1,
              const float* packed, float* partial, float* out, const float* res) {
  Vec sum[kDenseChannels][NV];
  for_each<kDenseChannels>([&](auto j) SPARSE_INLINE {
    if (k0 == 0) {
      const Vec bias = broadcast(op.bias[std::min<int64_t>(c + j, op.channels - 1)]);
      for_each<NV>([&](auto i) SPARSE_INLINE { sum[j][i] = bias; });
    } else {
      for_each<NV>([&](auto i) SPARSE_INLINE { sum[j][i] = load(partial + (j * NV + i) * kLanes); });
    }
  });
  const float* w = op.weights + (c / kDenseChannels * op.depth + k0) * kDenseChannels;
  for (int64_t k = k0; k < k1; ++k, w += kDenseChannels, packed += NV * kLanes) {
    // All inputs are loaded before the weights: sums, inputs and one weight fill the registers.
    Vec x[NV];
    for_each<NV>([&](auto i) SPARSE_INLINE { x[i] = load(packed + i * kLanes); });
    for_each<kDenseChannels>([&](auto j) SPARSE_INLINE {
      const Vec weight = broadcast(w[j]);
      for_each<NV>([&](auto i) SPARSE_INLINE { sum[j][i] += weight * x[i]; });
    });
  }
  for_each<kDenseChannels>([&](auto j) SPARSE_INLINE {
    if (k1 < op.depth) {
      for_each<NV>([&](auto i) SPARSE_INLINE { store(partial + (j * NV + i) * kLanes, sum[j][i]); });
    } else if (c + j < op.channels) {
      for_each<NV>([&](auto i) SPARSE_INLINE {
        Vec v = sum[j][i];
        if (res) v += load(res + (c + j) * op.res_plane + tile.res[i]);
        if (op.relu) v = maximum(v, Vec{});
        if (op.mask) v = keep(v, load_mask(op.mask + tile.mask[i]));
        store(out + (c + j) * op.out_plane + tile.out[i], v);
      });
    }
  });
}

template <int NV>
void dense_tile(const Op& op, float* arena, int64_t p0, int64_t p1, const DenseTile& tile,
                float* scratch) {
  float* packed = scratch;
  float* partials = scratch + kDenseDepth * kDenseVectors * kLanes;
  const int64_t first = op.part_begin[p0], end = op.part_begin[p1];
  const float* res = op.res < 0 ? nullptr : arena + op.res;
  const int64_t blocks = (op.depth + kDenseDepth - 1) / kDenseDepth;
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t k0 = cut(0, op.depth, block, blocks), k1 = cut(0, op.depth, block + 1, blocks);
    pack<NV>(op, arena + op.in, tile, k0, k1, packed);
    for (int64_t c = first; c < end; c += kDenseChannels) {
      multiply<NV>(op, tile, c, k0, k1, packed, partials + (c - first) * NV * kLanes,
                   arena + op.out, res);
    }
  }
}

}  // namespace

void dense_conv(const Op& op, float* arena, int64_t p0, int64_t p1, int64_t y0, int64_t y1,
                float* scratch) {
  const int64_t total = (y1 - y0) * op.vectors;
  const int64_t tiles = (total + kDenseVectors - 1) / kDenseVectors;
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t begin = cut(0, total, t, tiles), size = cut(0, total, t + 1, tiles) - begin;
    DenseTile tile{};
    for (int64_t i = 0; i < size; ++i) {
      const int64_t y = y0 + (begin + i) / op.vectors, x = (begin + i) % op.vectors;
      tile.in[i] = y * op.stride_y * op.in_row + x * op.stride_x * kLanes;
      tile.out[i] = y * op.out_row + x * kLanes;
      tile.res[i] = y * op.res_row + x * kLanes;
      tile.mask[i] = y * op.mask_row + x * kLanes;
    }
    for_each<kDenseVectors>([&](auto i) SPARSE_INLINE {
      if (size == i + 1) dense_tile<i + 1>(op, arena, p0, p1, tile, scratch);
    });
  }
  fill_halo(op, arena + op.out, y0, y1, op.part_begin[p0], op.part_begin[p1]);
}

int64_t scratch_floats(const Op& op) {
  const int64_t channels = op.channels + kDenseChannels;  // whole groups
  if (op.kind == kSparseConv) return channels * kMaxTile * kLanes;
  if (op.kind == kDenseConv) return (kDenseDepth + channels) * kDenseVectors * kLanes;
  return 0;
}

}  // namespace sparse_runtime
