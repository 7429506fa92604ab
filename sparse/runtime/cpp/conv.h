// Sparse and dense convolutions of one tile or of a range of rows.
#pragma once

#include <utility>

#include "op.h"
#include "simd.h"

namespace sparse_runtime {

constexpr int kMaxTile = 14;      // vectors of a sparse tile: accumulators that fit 16 registers
constexpr int kAhead = 2;         // output channels between the fetch of a tile and its use
constexpr int kLineFloats = 16;   // of a cache line
constexpr int kDenseVectors = 3;  // a dense tile is 3 vectors by 4 channels: 12 accumulators
constexpr int kDenseChannels = 4;
constexpr int kDenseDepth = 256;  // terms summed at a time: the packed input stays in L1

// Accumulators are indexed by constants only: compilers then keep them in registers.
template <int VX, int VY, int SX, typename Index>
struct SparseTile;

template <int VX, int VY, int SX, int... I>
struct SparseTile<VX, VY, SX, std::integer_sequence<int, I...>> {
  static constexpr int kSize = VX * VY;
  // An FMA takes 4 cycles and two start in each: 8 independent sums keep the units busy.
  static constexpr int kSums = kSize <= 2 ? 4 : kSize <= 6 ? 2 : 1;

  static inline __attribute__((always_inline)) void add(Vec* sum, const float* in, int64_t in_row,
                                                        float weight) {
    const Vec w = broadcast(weight);
    ((sum[I] += w * load(in + (I / VX) * in_row + (I % VX) * SX * kLanes)), ...);
  }

  static inline __attribute__((always_inline)) void dot(Vec* sum, const Connection* p, int64_t n,
                                                        const float* in, int64_t in_row) {
    if constexpr (kSums == 1) {
      for (; n >= 2; n -= 2, p += 2) {
        add(sum, in + p[0].offset, in_row, p[0].weight);
        add(sum, in + p[1].offset, in_row, p[1].weight);
      }
      if (n) add(sum, in + p[0].offset, in_row, p[0].weight);
    } else {
      Vec more[kSums - 1][kSize];
      for (auto& other : more) ((other[I] = Vec{}), ...);
      for (; n >= 4; n -= 4, p += 4) {
        add(sum, in + p[0].offset, in_row, p[0].weight);
        add(more[0], in + p[1].offset, in_row, p[1].weight);
        add(kSums == 4 ? more[kSums / 4] : sum, in + p[2].offset, in_row, p[2].weight);
        add(more[kSums - 2], in + p[3].offset, in_row, p[3].weight);
      }
      for (; n > 0; --n, ++p) add(sum, in + p->offset, in_row, p->weight);
      for (auto& other : more) ((sum[I] += other[I]), ...);
    }
  }

  static void finish(const Op& op, Vec* sum, float* out, const float* res, const int32_t* mask) {
    if (res) ((sum[I] += load(res + (I / VX) * op.res_row + (I % VX) * kLanes)), ...);
    if (op.relu) ((sum[I] = maximum(sum[I], Vec{})), ...);
    if (mask) ((sum[I] = keep(sum[I], load_mask(mask + (I % VX) * kLanes))), ...);
    (store(out + (I / VX) * op.out_row + (I % VX) * kLanes, sum[I]), ...);
  }

  // Bring what a tile will be added to, or written to, into the cache.
  static inline __attribute__((always_inline)) void fetch(const float* p, int64_t row) {
    for (int y = 0; y < VY; ++y) {
      for (int x = 0; x < VX * kLanes; x += kLineFloats) {
        __builtin_prefetch(p + y * row + x, 1);
      }
    }
  }

  // All output channels of one part. `scratch` holds the partial sums between blocks of input
  // channels: kSize vectors per channel of the part.
  static void run(const Op& op, int64_t part, const float* in, float* out, const float* res,
                  const int32_t* mask, float* scratch) {
    const int64_t first = op.part_begin[part];
    const int64_t num = op.part_begin[part + 1] - first;
    const int32_t* begin = op.row_begin + op.num_blocks * (first + part);
    const int32_t* channel = op.row_channel + op.num_blocks * first;
    const int64_t in_row = op.in_row * op.stride_y;
    for (int64_t block = 0; block < op.num_blocks; ++block, begin += num + 1, channel += num) {
      const bool is_first = block == 0, is_last = block + 1 == op.num_blocks;
      for (int64_t k = 0; k < num; ++k) {
        const int64_t c = channel[k];
        float* partial = scratch + (c - first) * kSize * kLanes;
        Vec sum[kSize];
        if (is_first) {
          const Vec bias = broadcast(op.bias[c]);
          ((sum[I] = bias), ...);
        } else {
          ((sum[I] = load(partial + I * kLanes)), ...);
        }
        if (is_last && k + kAhead < num) {
          // Channels come in no order that the processor could foresee.
          const int64_t next = channel[k + kAhead];
          fetch(res ? res + next * op.res_plane : out + next * op.out_plane,
                res ? op.res_row : op.out_row);
        }
        dot(sum, op.connections + begin[k], begin[k + 1] - begin[k], in, in_row);
        if (is_last) {
          finish(op, sum, out + c * op.out_plane, res ? res + c * op.res_plane : nullptr, mask);
        } else {
          (store(partial + I * kLanes, sum[I]), ...);
        }
      }
    }
  }
};

using TileFunction = void (*)(const Op&, int64_t, const float*, float*, const float*,
                              const int32_t*, float*);

// Return the kernel of a tile, null if there is none of this size.
TileFunction find_tile(int64_t vectors, int64_t rows, int64_t stride_x);

// Compute output rows y0 <= y < y1 of the channels of parts p0 <= p < p1, halos included. `scratch`
// has at least scratch_floats(op) floats, aligned to a vector.
void sparse_conv(const Op& op, float* arena, int64_t p0, int64_t p1, int64_t y0, int64_t y1,
                 float* scratch);
void dense_conv(const Op& op, float* arena, int64_t p0, int64_t p1, int64_t y0, int64_t y1,
                float* scratch);
int64_t scratch_floats(const Op& op);

// Repeat border columns in the halos of rows y0 <= y < y1, channels c0 <= c < c1.
void fill_halo(const Op& op, float* out, int64_t y0, int64_t y1, int64_t c0, int64_t c1);

}  // namespace sparse_runtime
