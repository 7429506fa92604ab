// Sparse and dense convolutions of one tile or of a range of rows.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <utility>

#include "activation.h"
#include "op.h"
#include "simd.h"

namespace sparse_runtime {

// AVX-512 and 64-bit ARM have 32 vector registers, other machines 16.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kRegisters = 32;
#else
constexpr int kRegisters = 16;
#endif
constexpr int kMaxTile = 14;      // vectors of a sparse tile of one channel
constexpr int kAhead = 2;         // channels or groups between a prefetch and its use
constexpr int kStreamAhead = 256;  // words between the prefetch of a connection and its use
constexpr int kLineFloats = 16;   // floats of a cache line
constexpr int kDenseChannels = 4;
// Vectors of a dense tile of 4 channels: sums, inputs and one weight fill the registers.
constexpr int kDenseVectors = kRegisters == 32 ? 6 : 3;
// Terms that are summed at a time at most: up to 36 KiB of packed input, less with short vectors.
constexpr int kDenseDepth = 9216 / (kDenseVectors * kLanes);

// Most vectors of a tile of `group` channels: sums, inputs and weights fit the registers. AVX-512
// takes weights from memory. ARM needs 4 registers for them.
constexpr int max_tile(int group) {
  if (group == 1) return kMaxTile;
  if (group == 2) return kRegisters == 32 ? 8 : 6;
#if defined(__aarch64__)
  return 6;
#else
  return kRegisters == 32 ? 7 : 3;
#endif
}

// Functions that take sums must be inlined; otherwise the sums are in memory.
#define SPARSE_INLINE __attribute__((always_inline))

// Call f(0), .., f(N - 1) with compile-time constants, so that arrays of sums become registers.
template <typename F, int... I>
inline SPARSE_INLINE void for_each(F f, std::integer_sequence<int, I...>) {
  (f(std::integral_constant<int, I>()), ...);
}

template <int N, typename F>
inline SPARSE_INLINE void for_each(F f) {
  for_each(f, std::make_integer_sequence<int, N>());
}

constexpr int num_bits(int pattern) { return pattern ? (pattern & 1) + num_bits(pattern >> 1) : 0; }

// Offsets and weights share one stream of 4-byte words.
inline int32_t offset_at(const float* p) {
  int32_t offset;
  std::memcpy(&offset, p, sizeof offset);
  return offset;
}

// How a sparse tile computes in float32: the type of a sum, and what happens to sums.
struct Float32 {
  using Sum = Vec;
  using Weight = Vec;
  static constexpr bool kByPattern = true;  // whether every pattern of channels has its own code
  static constexpr bool kActivates = true;  // whether activations above kRelu follow the writer

  static inline SPARSE_INLINE Sum start(const Op& op, int64_t c) { return broadcast(op.bias[c]); }
  static inline SPARSE_INLINE Weight weight(const float* p) { return broadcast(*p); }
  static inline SPARSE_INLINE void add(Sum& sum, const Weight& weight, Vec x) { sum += weight * x; }
  static inline SPARSE_INLINE void join(Sum& sum, Sum other) { sum += other; }
  static constexpr int kTogether = 1;  // channels that are written together

  // Writes the sums of channel c in a tile of VX vectors per row. `out` and `res` are in plane 0.
  template <int VX, int kSize>
  struct Writer {
    inline SPARSE_INLINE void write(const Op& op, int64_t c, Sum (&sum)[kSize], float* out,
                                    const float* res, const int32_t* mask) {
      out += c * op.out_plane;
      if (res) res += c * op.res_plane;
      for_each<kSize>([&](auto i) SPARSE_INLINE {
        if (res) sum[i] += load(res + (i / VX) * op.res_row + (i % VX) * kLanes);
        if (op.activation == kRelu) sum[i] = maximum(sum[i], Vec{});
        if (mask) sum[i] = keep(sum[i], load_mask(mask + (i / VX) * op.mask_row + (i % VX) * kLanes));
        store(out + (i / VX) * op.out_row + (i % VX) * kLanes, sum[i]);
      });
    }
  };
};

// A tile of a group of P output channels by VX x VY vectors. The connections of a group are sorted
// by their pattern: the set of channels to which they lead. An input is thus loaded once for all of
// these channels. SX is the stride between vectors, or 0 if the operation has it. A is the arithmetic.
template <typename A, int P, int VX, int VY, int SX>
struct SparseTile {
  using Sum = typename A::Sum;
  static constexpr int kSize = VX * VY;
  static constexpr int kPatterns = (1 << P) - 1;
  static constexpr int kFetch = kAhead * std::max(P, A::kTogether);  // channels before their use
  // An FMA takes 4 cycles, and two start in each cycle: 8 independent sums keep the units busy.
  static constexpr int kSums = P > 1 ? 1 : kSize <= 2 ? 4 : kSize <= 6 ? 2 : 1;
  using Sums = Sum[P][kSize];

  // Distances between the rows and between the vectors of the input.
  struct Strides {
    int64_t row, vector;
  };

  static inline SPARSE_INLINE Vec input(const float* in, Strides strides, int i) {
    return load(in + (i / VX) * strides.row + (i % VX) * strides.vector);
  }

  // Add the connection at `p`: an offset, and one weight for every channel of the pattern.
  template <int kPattern>
  static inline SPARSE_INLINE void add(Sums& sum, const float* p, const float* in,
                                                        Strides strides) {
    in += offset_at(p);
    typename A::Weight weight[P];
    int next = 1;
    for_each<P>([&](auto c) SPARSE_INLINE {
      if constexpr (kPattern >> c & 1) weight[c] = A::weight(p + next++);
    });
    for_each<kSize>([&](auto i) SPARSE_INLINE {
      Vec x = input(in, strides, i);
      if constexpr (P > 1) hold(x);
      for_each<P>([&](auto c) SPARSE_INLINE {
        if constexpr (kPattern >> c & 1) A::add(sum[c][i], weight[c], x);
      });
    });
  }

  // Add the next n connections, all of one pattern. Return where the following ones begin.
  template <int kPattern>
  static inline SPARSE_INLINE const float* dot(Sums& sum, const float* p,
                                                                int64_t n, const float* in,
                                                                Strides strides) {
    constexpr int words = 1 + num_bits(kPattern);
    if constexpr (kSums > 1) {
      Sum more[kSums - 1][1][kSize];
      for (auto& other : more) for_each<kSize>([&](auto i) SPARSE_INLINE { other[0][i] = Sum{}; });
      for (; n >= 4; n -= 4, p += 4 * words) {
        __builtin_prefetch(p + kStreamAhead);
        add<kPattern>(sum, p, in, strides);
        add<kPattern>(more[0], p + words, in, strides);
        add<kPattern>(kSums == 4 ? more[kSums / 4] : sum, p + 2 * words, in, strides);
        add<kPattern>(more[kSums - 2], p + 3 * words, in, strides);
      }
      for (auto& other : more) for_each<kSize>([&](auto i) SPARSE_INLINE { A::join(sum[0][i], other[0][i]); });
    }
    if constexpr (P == 1) {
      for (; n >= 2; n -= 2, p += 2 * words) {
        __builtin_prefetch(p + kStreamAhead);
        add<kPattern>(sum, p, in, strides);
        add<kPattern>(sum, p + words, in, strides);
      }
    }
    for (; n > 0; --n, p += words) {
      if (P > 1) __builtin_prefetch(p + kStreamAhead);
      add<kPattern>(sum, p, in, strides);
    }
    return p;
  }

  // The same for any pattern: short code instead of fast code.
  static inline SPARSE_INLINE const float* dot_any(int pattern, Sums& sum, const float* p,
                                                   int64_t n, const float* in, Strides strides) {
    for (; n > 0; --n) {
      const float* from = in + offset_at(p++);
      for (int c = 0; c < P; ++c) {
        if (!(pattern >> c & 1)) continue;
        const typename A::Weight weight = A::weight(p++);
        for_each<kSize>([&](auto i) SPARSE_INLINE {
          A::add(sum[c][i], weight, input(from, strides, i));
        });
      }
    }
    return p;
  }

  // Prefetch the memory to which a tile will be added or written.
  static inline SPARSE_INLINE void fetch(const float* p, int64_t row) {
    for (int y = 0; y < VY; ++y) {
      for (int x = 0; x < VX * kLanes; x += kLineFloats) {
        __builtin_prefetch(p + y * row + x, 1);
      }
    }
  }

  // Compute all output channels of one part. `scratch` holds the partial sums between blocks of
  // connections.
  static void run(const Op& op, int64_t part, const float* in, float* out, const float* res,
                  const int32_t* mask, float* scratch) {
    const int64_t first = op.part_begin[part], num = op.part_begin[part + 1] - first;
    const int64_t groups = (num + P - 1) / P;
    const int32_t* channel = op.row_channel + first;
    const float* p = op.connections + op.part_stream[part];
    const int32_t* count = op.counts + op.num_blocks * kPatterns * (first / P);
    const Strides strides{op.in_row * op.stride_y, (SX > 0 ? SX : op.stride_x) * kLanes};
    typename A::template Writer<VX, kSize> writer;
    for (int64_t block = 0; block < op.num_blocks; ++block) {
      const bool is_first = block == 0, is_last = block + 1 == op.num_blocks;
      float* partial = scratch;
      for (int64_t g = 0; g < groups; ++g, count += kPatterns, partial += P * kSize * kLanes) {
        const int64_t left = num - g * P;  // channels: the last group may have less than P
        Sums sum;
        for_each<P>([&](auto c) SPARSE_INLINE {
          if (is_first) {
            const Sum bias = c < left ? A::start(op, channel[g * P + c]) : Sum{};
            for_each<kSize>([&](auto i) SPARSE_INLINE { sum[c][i] = bias; });
          } else {
            for_each<kSize>([&](auto i) SPARSE_INLINE { sum[c][i] = reinterpret_cast<Sum>(load(partial + (c * kSize + i) * kLanes)); });
          }
          if (is_last && c + kFetch < left) {
            // The processor cannot predict the order of the channels.
            const int64_t next = channel[g * P + c + kFetch];
            const int64_t in_plane = A::kTogether == 1 ? 1 : channels_in_plane(op);
            if (next % in_plane == 0) {
              const int64_t plane = next / in_plane;
              fetch(res ? res + plane * op.res_plane : out + plane * op.out_plane,
                    res ? op.res_row : op.out_row);
            }
          }
        });
        if constexpr (P == 1 || A::kByPattern) {
          for_each<kPatterns>([&](auto k) SPARSE_INLINE {
            p = dot<k + 1>(sum, p, count[k], in, strides);
          });
        } else {
          for (int k = 0; k < kPatterns; ++k) p = dot_any(k + 1, sum, p, count[k], in, strides);
        }
        for_each<P>([&](auto c) SPARSE_INLINE {
          if (!is_last) {
            for_each<kSize>([&](auto i) SPARSE_INLINE { store(partial + (c * kSize + i) * kLanes, reinterpret_cast<Vec>(sum[c][i])); });
          } else if (c < left) {
            writer.write(op, channel[g * P + c], sum[c], out, res, mask);
          }
        });
        if (A::kActivates && is_last && op.activation > kRelu) {
          for (int64_t c = 0; c < std::min<int64_t>(P, left); ++c) {
            activate_tile(op, out + channel[g * P + c] * op.out_plane, mask, VY, VX);
          }
        }
      }
    }
  }
};

using TileFunction = void (*)(const Op&, int64_t, const float*, float*, const float*,
                              const int32_t*, float*);

// Without a name, so that libraries of several levels in one process do not share these tables.
namespace {

template <typename A, int P, int VY, int SX, int... X>
TileFunction pick_tile(int64_t vectors, std::integer_sequence<int, X...>) {
  static constexpr TileFunction table[] = {&SparseTile<A, P, X + 1, VY, SX>::run..., nullptr};
  return vectors >= 1 && vectors <= int64_t(sizeof...(X)) ? table[vectors - 1] : nullptr;
}

template <typename A, int P, int VY, int SX>
TileFunction pick_tile(int64_t vectors) {
  constexpr int most = VY == 1 ? std::min(8, max_tile(P)) : max_tile(P) / VY;
  return pick_tile<A, P, VY, SX>(vectors, std::make_integer_sequence<int, most>());
}

template <typename A, int P, int SX>
TileFunction pick_tile(int64_t vectors, int64_t rows) {
  switch (rows) {
    case 1: return pick_tile<A, P, 1, SX>(vectors);
    case 2: return pick_tile<A, P, 2, SX>(vectors);
    case 3: return pick_tile<A, P, 3, SX>(vectors);
    case 4: return pick_tile<A, P, 4, SX>(vectors);
    case 5: return pick_tile<A, P, 5, SX>(vectors);
    case 6: return pick_tile<A, P, 6, SX>(vectors);
    case 7: return pick_tile<A, P, 7, SX>(vectors);
    default: return nullptr;
  }
}

// Return the kernel of a tile, or null if there is none of this size.
template <typename A>
TileFunction pick_tile(int64_t group, int64_t vectors, int64_t rows, int64_t stride_x) {
  if (stride_x > 1 && group > 1) return nullptr;
  if (stride_x == 2) return pick_tile<A, 1, 2>(vectors, rows);
  if (stride_x > 2) return rows == 1 ? pick_tile<A, 1, 1, 0>(vectors) : nullptr;
  switch (group) {
    case 1: return pick_tile<A, 1, 1>(vectors, rows);
    case 2: return pick_tile<A, 2, 1>(vectors, rows);
    case 4: return pick_tile<A, 4, 1>(vectors, rows);
    default: return nullptr;
  }
}

}  // namespace

// The kernel of a tile of a sparse convolution, in float32 or in int8 (kQuantConv).
TileFunction find_tile(int64_t kind, int64_t group, int64_t vectors, int64_t rows,
                       int64_t stride_x);
TileFunction find_int8_tile(int64_t group, int64_t vectors, int64_t rows, int64_t stride_x);

// Compute output rows y0 <= y < y1 of the channels of parts p0 <= p < p1, halos included. `scratch`
// has at least scratch_floats(op) floats, aligned to a vector.
void sparse_conv(const Op& op, float* arena, int64_t p0, int64_t p1, int64_t y0, int64_t y1,
                 float* scratch);
void dense_conv(const Op& op, float* arena, int64_t p0, int64_t p1, int64_t y0, int64_t y1,
                float* scratch);
int64_t scratch_floats(const Op& op);

// Repeat border columns in the halos of rows y0 <= y < y1, planes c0 <= c < c1. What lies outside the
// image becomes op.fill, the zero point of an int8 map.
void fill_halo(const Op& op, float* out, int64_t y0, int64_t y1, int64_t c0, int64_t c1);

}  // namespace sparse_runtime
