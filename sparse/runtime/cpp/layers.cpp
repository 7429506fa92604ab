#include "layers.h"

#include <limits>

#include "activation.h"
#include "conv.h"
#include "simd.h"

namespace sparse_runtime {

void read_input(const Op& op, const float* image, float* arena, int64_t y0, int64_t y1) {
  const int64_t pixels = op.height * op.width;
  for (int64_t y = y0; y < y1; ++y) {
    const int32_t left = int32_t(pixels - y * op.width);  // pixels from row y on
    for (int64_t c = 0; c < op.channels; ++c) {
      const float* in = image + c * pixels + y * op.width;
      float* out = arena + op.out + y * op.out_row + c * op.out_plane;
      for (int64_t i = 0; i < op.vectors * kLanes; i += kLanes) {
        const Mask place = load_mask(op.offsets + i);
        store(out + i, gather(in, place | (place >= left)));  // -1 below the image
      }
    }
  }
  fill_halo(op, arena + op.out, y0, y1, 0, op.channels);
}

void repack(const Op& op, float* arena, int64_t y0, int64_t y1) {
  const int64_t size = op.vectors * kLanes;
  const Vec fill = filler(op.fill);
  for (int64_t y = y0; y < y1; ++y) {
    const int32_t* place = op.offsets + y * size;
    for (int64_t c = 0; c < op.channels; ++c) {
      const float* in = arena + op.in + (op.row_channel ? op.row_channel[c] : c) * op.in_plane;
      float* out = arena + op.out + y * op.out_row + c * op.out_plane;
      if (op.depth) {
        for (int64_t i = 0; i < size; i += kLanes) store(out + i, load(in + place[i]));
      } else {
        for (int64_t i = 0; i < size; i += kLanes) {
          const Mask from = load_mask(place + i);
          store(out + i, choose(from >= 0, gather(in, from), fill));
        }
      }
    }
  }
  fill_halo(op, arena + op.out, y0, y1, 0, op.channels);
}

void write_output(const Op& op, const float* arena, float* image, int64_t y0, int64_t y1) {
  const int64_t size = op.vectors * kLanes;
  for (int64_t y = y0; y < y1; ++y) {
    const int32_t* place = op.offsets + y * size;
    for (int64_t c = 0; c < op.channels; ++c) {
      const float* in = arena + op.in + y * op.in_row + c * op.in_plane;
      float* out = image + c * op.height * op.width;
      for (int64_t i = 0; i < size; ++i) {
        if (place[i] >= 0) out[place[i]] = in[i];
      }
    }
  }
}

void scale(const Op& op, float* arena, int64_t y0, int64_t y1) {
  const float* factor = arena + op.res;
  for (int64_t y = y0; y < y1; ++y) {
    const int32_t* mask = op.mask ? op.mask + y * op.mask_row : nullptr;
    for (int64_t c = 0; c < op.channels; ++c) {
      const Vec f = broadcast(factor[c]);
      const float* in = arena + op.in + y * op.in_row + c * op.in_plane;
      float* out = arena + op.out + y * op.out_row + c * op.out_plane;
      for (int64_t i = 0; i < op.vectors * kLanes; i += kLanes) {
        const Vec v = f * load(in + i);
        store(out + i, mask ? keep(v, load_mask(mask + i)) : v);
      }
    }
  }
  fill_halo(op, arena + op.out, y0, y1, 0, op.channels);
}

void max_pool(const Op& op, float* arena, int64_t y0, int64_t y1) {
  const Vec lowest = broadcast(-std::numeric_limits<float>::infinity());
  const int32_t* valid_rows = op.offsets + op.width * kLanes;
  for (int64_t y = y0; y < y1; ++y) {
    for (int64_t c = 0; c < op.channels; ++c) {
      const float* in = arena + op.in + c * op.in_plane;
      float* out = arena + op.out + y * op.out_row + c * op.out_plane;
      for (int64_t i = 0; i < op.vectors; ++i) {
        Vec best = lowest;
        for (int64_t dy = 0; dy < op.window_y; ++dy) {
          const int64_t row = y * op.stride_y + dy;
          const int64_t first = i * op.stride_x;
          const Mask valid_row = load_mask(valid_rows + row * kLanes);
          const float* p = in + (row - op.pad_y) * op.in_row + (first - op.pad_x) * kLanes;
          const int32_t* valid = op.offsets + first * kLanes;
          for (int64_t dx = 0; dx < op.stride_x; ++dx) {
            __builtin_prefetch(p + kAhead * op.in_plane + dx * kLanes);
          }
          for (int64_t dx = 0; dx < op.window_x; ++dx) {
            const Vec v = load(p + dx * kLanes);
            best = larger((load_mask(valid + dx * kLanes) & valid_row) ? v : lowest, best);
          }
        }
        if (op.mask) best = keep(best, load_mask(op.mask + y * op.mask_row + i * kLanes));
        store(out + i * kLanes, best);
      }
    }
  }
  fill_halo(op, arena + op.out, y0, y1, 0, op.channels);
}

namespace {

float sum_lanes(Vec v) {
  float sum = 0;
  for (int lane = 0; lane < kLanes; ++lane) sum += v[lane];
  return sum;
}

}  // namespace

void mean_pool(const Op& op, const float* arena, float* out, int64_t c0, int64_t c1) {
  const int64_t vectors = op.vectors;
  for (int64_t c = c0; c < c1; ++c) {
    const float* in = arena + op.in + c * op.in_plane;
    Vec sum{};
    for (int64_t y = 0; y < op.height; ++y) {
      for (int64_t i = 0; i < vectors; ++i) sum += load(in + y * op.in_row + i * kLanes);
    }
    out[c] = sum_lanes(sum) / float(op.depth);
  }
}

namespace {

// Connections are pairs of an offset and a weight.
float sparse_dot(const float* p, int64_t n, const float* x) {
  float s0 = 0, s1 = 0, s2 = 0, s3 = 0;
  for (; n >= 4; n -= 4, p += 8) {
    __builtin_prefetch(p + kStreamAhead);
    s0 += p[1] * x[offset_at(p)];
    s1 += p[3] * x[offset_at(p + 2)];
    s2 += p[5] * x[offset_at(p + 4)];
    s3 += p[7] * x[offset_at(p + 6)];
  }
  for (; n > 0; --n, p += 2) s0 += p[1] * x[offset_at(p)];
  return (s0 + s1) + (s2 + s3);
}

// `depth` is a multiple of the lanes.
float dense_dot(const float* w, const float* x, int64_t depth) {
  Vec s0{}, s1{}, s2{}, s3{};
  int64_t k = 0;
  for (; k + 4 * kLanes <= depth; k += 4 * kLanes) {
    s0 += load(w + k) * load(x + k);
    s1 += load(w + k + kLanes) * load(x + k + kLanes);
    s2 += load(w + k + 2 * kLanes) * load(x + k + 2 * kLanes);
    s3 += load(w + k + 3 * kLanes) * load(x + k + 3 * kLanes);
  }
  for (; k < depth; k += kLanes) s0 += load(w + k) * load(x + k);
  return sum_lanes((s0 + s1) + (s2 + s3));
}

}  // namespace

void linear(const Op& op, const float* arena, float* out, int64_t c0, int64_t c1) {
  const float* x = arena + op.in;
  for (int64_t c = c0; c < c1; ++c) {
    const float dot = op.kind == kSparseLinear
                          ? sparse_dot(op.connections + 2 * op.row_begin[c],
                                       op.row_begin[c + 1] - op.row_begin[c], x)
                          : dense_dot(op.weights + c * op.depth, x, op.depth);
    out[c] = dot + op.bias[c];
  }
  activate(op.activation, out + c0, c1 - c0);
}

}  // namespace sparse_runtime
