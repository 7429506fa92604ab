#include "int8.h"

#include <algorithm>
#include <type_traits>
#ifdef __SSE2__
#include <immintrin.h>
#endif
#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

#include "conv.h"
#include "simd.h"

namespace sparse_runtime {

bool slow_int8 = false;

namespace {

constexpr int kBits = 8;         // of an activation
constexpr int32_t kByte = 0xff;  // the bits of the first of 4 channels

inline Mask bits(Vec v) { return reinterpret_cast<Mask>(v); }
inline Vec as_vec(Mask m) { return reinterpret_cast<Vec>(m); }
inline Mask spread(int32_t x) { return x - Mask{}; }
inline Vec to_float(Mask m) { return __builtin_convertvector(m, Vec); }

// a + b, which wraps: sums of a plan that is damaged may be too large.
inline Mask plus(Mask a, Mask b) {
  typedef uint32_t Bits __attribute__((vector_size(kLanes * 4)));
  return reinterpret_cast<Mask>(reinterpret_cast<Bits>(a) + reinterpret_cast<Bits>(b));
}
inline int32_t plus(int32_t a, int32_t b) { return int32_t(uint32_t(a) + uint32_t(b)); }

// A number below 2^22 that is added to this is rounded, to the even one of two integers, and the
// integer is in the low bits of the sum: 1.5 * 2^23.
constexpr float kRounder = 12582912.0f;

inline Mask round(Vec v) {
  const Vec rounder = broadcast(kRounder);
  return bits(v + rounder) - bits(rounder);
}

inline Vec at_most(Vec v, float high) {
  const Vec most = broadcast(high);
  return v < most ? v : most;
}

// Limit to a range; a NaN becomes `low`.
inline Vec clamp(Vec v, float low, float high) {
  const Vec least = broadcast(low);
  return at_most(v > least ? v : least, high);
}

inline int32_t word_at(const float* p) { return offset_at(p); }

// How 4 neighboring channels are multiplied with their weights and added up, for every lane. Weight
// is what the instructions need for one word of 4 weights.

#if (defined(__AVX512BW__) && SPARSE_LANES == 16) || (defined(__AVX2__) && SPARSE_LANES == 8) || \
    (defined(__SSE2__) && SPARSE_LANES == 4)
// Pairs of 16-bit products, which cannot overflow: the instruction for bytes (maddubs) saturates.
struct Plain {
  struct Weight {
    Mask even, odd;
  };
  typedef int16_t Shorts __attribute__((vector_size(kLanes * 4)));
  typedef uint16_t UShorts __attribute__((vector_size(kLanes * 4)));

  static inline SPARSE_INLINE Weight split(Mask w) {
    const Shorts pairs = reinterpret_cast<Shorts>(w);
    return {reinterpret_cast<Mask>((pairs << kBits) >> kBits),
            reinterpret_cast<Mask>(pairs >> kBits)};
  }
  static inline SPARSE_INLINE Mask pairs(Mask x, Mask w) {
#if SPARSE_LANES == 16
    return reinterpret_cast<Mask>(
        _mm512_madd_epi16(reinterpret_cast<__m512i>(x), reinterpret_cast<__m512i>(w)));
#elif SPARSE_LANES == 8
    return reinterpret_cast<Mask>(
        _mm256_madd_epi16(reinterpret_cast<__m256i>(x), reinterpret_cast<__m256i>(w)));
#else
    return reinterpret_cast<Mask>(
        _mm_madd_epi16(reinterpret_cast<__m128i>(x), reinterpret_cast<__m128i>(w)));
#endif
  }
  static inline SPARSE_INLINE Mask dot(Mask sum, Mask x, const Weight& w) {
    const UShorts bytes = reinterpret_cast<UShorts>(x);
    return plus(plus(sum, pairs(reinterpret_cast<Mask>(bytes & uint16_t(kByte)), w.even)),
                pairs(reinterpret_cast<Mask>(bytes >> kBits), w.odd));
  }
#else
struct Plain {
  struct Weight {
    Mask by_channel[kPacked];
  };

  static inline SPARSE_INLINE Weight split(Mask w) {
    Weight found;
    for (int i = 0; i < kPacked; ++i) {
      found.by_channel[i] = (w << ((kPacked - 1 - i) * kBits)) >> ((kPacked - 1) * kBits);
    }
    return found;
  }
  static inline SPARSE_INLINE Mask dot(Mask sum, Mask x, const Weight& w) {
    for (int i = 0; i < kPacked; ++i) {
      sum = plus(sum, ((x >> (i * kBits)) & kByte) * w.by_channel[i]);
    }
    return sum;
  }
#endif
  static constexpr bool kSigned = false;
  static bool runs_here() { return false; }
};

// One instruction that multiplies and adds 4 bytes. Not all processors of a level have it, so it is
// written for the assembler, which needs no permission of the compiler's flags.
#if defined(__AVX512F__) && SPARSE_LANES == 16
struct Fast {
  using Weight = Mask;
  static constexpr bool kSigned = false;

  static bool runs_here() { return __builtin_cpu_supports("avx512vnni"); }
  static inline SPARSE_INLINE Weight split(Mask w) { return w; }
  static inline SPARSE_INLINE Mask dot(Mask sum, Mask x, const Weight& w) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(x), "v"(w));
    return sum;
  }
};
#elif defined(__AVX2__) && SPARSE_LANES == 8 && (__GNUC__ >= 11 || __clang_major__ >= 12)
struct Fast {  // assemblers that come with older compilers do not know the instruction
  using Weight = Mask;
  static constexpr bool kSigned = false;

  static bool runs_here() { return __builtin_cpu_supports("avxvnni"); }
  static inline SPARSE_INLINE Weight split(Mask w) { return w; }
  static inline SPARSE_INLINE Mask dot(Mask sum, Mask x, const Weight& w) {
    asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(x), "x"(w));
    return sum;
  }
};
#elif defined(__aarch64__) && SPARSE_LANES == 4 && defined(__linux__)
struct Fast {
  using Weight = Mask;
  // The instruction multiplies signed bytes. Activations are taken less 128.
  static constexpr bool kSigned = true;

  static bool runs_here() { return getauxval(AT_HWCAP) & HWCAP_ASIMDDP; }
  static inline SPARSE_INLINE Weight split(Mask w) { return w; }
  static inline SPARSE_INLINE Mask dot(Mask sum, Mask x, const Weight& w) {
    const Mask less = x ^ int32_t(0x80808080u);
    asm(".arch armv8.2-a+dotprod\n\tsdot %0.4s, %1.16b, %2.16b" : "+w"(sum) : "w"(less), "w"(w));
    return sum;
  }
};
#else
using Fast = Plain;
#endif

// x * factor + added, rounded once.
inline Vec fused(Vec x, Vec factor, Vec added) {
#if defined(__AVX512F__) && SPARSE_LANES == 16
  return _mm512_fmadd_ps(x, factor, added);
#elif defined(__AVX2__) && SPARSE_LANES == 8
  return _mm256_fmadd_ps(x, factor, added);
#else
  Vec found;
  for (int lane = 0; lane < kLanes; ++lane) {
    found[lane] = __builtin_fmaf(x[lane], factor[lane], added[lane]);
  }
  return found;
#endif
}

// Return the bytes of 4 channels, one word per lane: v rounded, plus `zero`, and 0 instead of less.
// No v is above 255 - zero.
inline SPARSE_INLINE Vec packed(const Vec (&v)[kPacked], int32_t zero) {
#if defined(__AVX512BW__) && SPARSE_LANES == 16
  // Packing saturates and leaves the lanes of a channel side by side, 4 at a time.
  const __m512i by_lane = _mm512_set4_epi32(0x0f0b0703, 0x0e0a0602, 0x0d090501, 0x0c080400);
  const __m512i low = _mm512_packs_epi32(_mm512_cvtps_epi32(v[0]), _mm512_cvtps_epi32(v[1]));
  const __m512i high = _mm512_packs_epi32(_mm512_cvtps_epi32(v[2]), _mm512_cvtps_epi32(v[3]));
  const __m512i added = _mm512_set1_epi16(int16_t(zero));
  const __m512i bytes = _mm512_packus_epi16(_mm512_adds_epi16(low, added),
                                            _mm512_adds_epi16(high, added));
  return _mm512_castsi512_ps(_mm512_shuffle_epi8(bytes, by_lane));
#elif defined(__AVX2__) && SPARSE_LANES == 8
  const __m256i by_lane = _mm256_set_epi32(0x0f0b0703, 0x0e0a0602, 0x0d090501, 0x0c080400,
                                           0x0f0b0703, 0x0e0a0602, 0x0d090501, 0x0c080400);
  const __m256i low = _mm256_packs_epi32(_mm256_cvtps_epi32(v[0]), _mm256_cvtps_epi32(v[1]));
  const __m256i high = _mm256_packs_epi32(_mm256_cvtps_epi32(v[2]), _mm256_cvtps_epi32(v[3]));
  const __m256i added = _mm256_set1_epi16(int16_t(zero));
  const __m256i bytes = _mm256_packus_epi16(_mm256_adds_epi16(low, added),
                                            _mm256_adds_epi16(high, added));
  return _mm256_castsi256_ps(_mm256_shuffle_epi8(bytes, by_lane));
#else
  const Vec least = broadcast(float(-zero));
  Mask words{};
  for (int j = 0; j < kPacked; ++j) {
    words |= (round(v[j] > least ? v[j] : least) + zero) << (j * kBits);
  }
  return as_vec(words);
#endif
}

// The values of 4 channels from their sums of products.
struct Quad {
  Rescale r;
  Vec scale[kPacked];

  Quad(const Op& op, int64_t first) : r(*op.rescale) {
    for (int64_t j = 0; j < kPacked; ++j) {
      scale[j] = broadcast(op.scales[std::min(first + j, op.channels - 1)]);
    }
  }

  // Sum number j is at sums[j * distance].
  template <bool kDivides>
  inline SPARSE_INLINE Vec pack(const Mask* sums, int64_t distance) const {
    Vec v[kPacked];
    for_each<kPacked>([&](auto j) SPARSE_INLINE {
      const Vec steps = to_float(sums[j * distance]) * scale[j];
      v[j] = at_most(kDivides ? steps / broadcast(r.divisor) : steps, r.high);
    });
    return packed(v, int32_t(r.zero));
  }

  // The same, after the bytes of `res` are added. The later operand is multiplied last.
  template <bool kOwnLast>
  inline SPARSE_INLINE Vec pack_sum(const Mask* sums, int64_t distance, Mask res) const {
    Vec v[kPacked];
    for_each<kPacked>([&](auto j) SPARSE_INLINE {
      const Vec steps = clamp(to_float(sums[j * distance]) * scale[j], -r.zero, r.high);
      const Vec own = (steps + broadcast(kRounder)) - broadcast(kRounder - r.zero);
      const Vec other = to_float((res >> (j * kBits)) & kByte);
      const Vec first = fused(kOwnLast ? other : own, broadcast(kOwnLast ? r.res_scale : r.own_scale),
                              broadcast(r.shift));
      const Vec sum = fused(kOwnLast ? own : other, broadcast(kOwnLast ? r.own_scale : r.res_scale),
                            first);
      v[j] = at_most(sum, r.sum_high);
    });
    return packed(v, 0);
  }
};

// Write a tile of channel `first` and the 3 that follow as float32, one plane each.
void write_floats(const Op& op, int64_t first, const Mask* sums, int64_t vectors, int64_t rows,
                  float* out, const float* res, const int32_t* mask) {
  const int64_t end = std::min(first + kPacked, op.channels);
  for (int64_t c = first; c < end; ++c, sums += vectors * rows) {
    const Vec scale = broadcast(op.scales[c]);
    float* to = out + c * op.out_plane;
    const float* other = res ? res + c * op.res_plane : nullptr;
    for (int64_t y = 0; y < rows; ++y) {
      for (int64_t i = 0; i < vectors; ++i) {
        Vec v = to_float(sums[y * vectors + i]) * scale;
        if (other) v += load(other + y * op.res_row + i * kLanes);
        if (mask) v = keep(v, load_mask(mask + y * op.mask_row + i * kLanes));
        store(to + y * op.out_row + i * kLanes, v);
      }
    }
    if (op.activation) activate_tile(op, to, mask, rows, vectors);
  }
}

// Write a tile of channel `first` and the 3 that follow: as bytes of one plane, with the zero point in
// lanes outside the image, or as float32. One function serves tiles of all sizes, which keeps the
// code short.
__attribute__((noinline)) void write_quad(const Op& op, int64_t first, const Mask* sums,
                                          int64_t vectors, int64_t rows, float* out,
                                          const float* res, const int32_t* mask) {
  if (!op.rescale) return write_floats(op, first, sums, vectors, rows, out, res, mask);
  const Quad quad(op, first);
  const Vec fill = filler(op.fill);
  const int64_t size = vectors * rows;
  out += first / kPacked * op.out_plane;
  if (res) res += first / kPacked * op.res_plane;
  const auto write = [&](auto pack) SPARSE_INLINE {
    for (int64_t y = 0; y < rows; ++y) {
      for (int64_t i = 0; i < vectors * kLanes; i += kLanes) {
        Vec packed = pack(sums++, y * op.res_row + i);
        if (mask) packed = choose(load_mask(mask + y * op.mask_row + i), packed, fill);
        store(out + y * op.out_row + i, packed);
      }
    }
  };
  if (!res && quad.r.divisor != 1) {
    write([&](const Mask* s, int64_t) SPARSE_INLINE { return quad.pack<true>(s, size); });
  } else if (!res) {
    write([&](const Mask* s, int64_t) SPARSE_INLINE { return quad.pack<false>(s, size); });
  } else if (quad.r.own_last != 0) {
    write([&](const Mask* s, int64_t at) SPARSE_INLINE {
      return quad.pack_sum<true>(s, size, bits(load(res + at)));
    });
  } else {
    write([&](const Mask* s, int64_t at) SPARSE_INLINE {
      return quad.pack_sum<false>(s, size, bits(load(res + at)));
    });
  }
}

// What a sum of products of channel c begins with.
template <typename D>
inline int32_t first_sum(const Op& op, int64_t c) {
  return plus(word_at(op.bias + c), D::kSigned ? word_at(op.bias + op.channels + c) : 0);
}

template <typename D>
struct Int8 {
  using Sum = Mask;
  using Weight = typename D::Weight;
  // All processors run Plain. Those for which it matters have an instruction of their own.
  static constexpr bool kByPattern = !std::is_same_v<D, Plain>;
  static constexpr bool kActivates = false;  // write_floats does it

  static inline SPARSE_INLINE Sum start(const Op& op, int64_t c) {
    return spread(first_sum<D>(op, c));
  }
  static inline SPARSE_INLINE Weight weight(const float* p) { return D::split(spread(word_at(p))); }
  static inline SPARSE_INLINE void add(Sum& sum, const Weight& weight, Vec x) {
    sum = D::dot(sum, bits(x), weight);
  }
  static inline SPARSE_INLINE void join(Sum& sum, Sum other) { sum = plus(sum, other); }
  static constexpr int kTogether = kPacked;

  // Channels come 4 by 4, one after the other.
  template <int VX, int kSize>
  struct Writer {
    Mask sums[kPacked][kSize];

    inline SPARSE_INLINE void write(const Op& op, int64_t c, Sum (&sum)[kSize], float* out,
                                    const float* res, const int32_t* mask) {
      int64_t member = c % kPacked;
      for_each<kSize>([&](auto i) SPARSE_INLINE { sums[member][i] = sum[i]; });
      if (c + 1 == op.channels) {
        for (; member + 1 < kPacked; ++member) {
          for_each<kSize>([&](auto i) SPARSE_INLINE { sums[member + 1][i] = Mask{}; });
        }
      }
      if (member + 1 == kPacked) {
        write_quad(op, c - c % kPacked, sums[0], VX, kSize / VX, out, res, mask);
      }
    }
  };
};

// Quantize a vector of floats; the integers are in its lanes.
inline Mask steps_of(Vec v, Vec scale, float zero) {
  return round(clamp(v / scale, -zero, float(kByte) - zero)) + int32_t(zero);
}

int32_t sum_lanes(Mask m) {
  int32_t sum = 0;
  for (int lane = 0; lane < kLanes; ++lane) sum = plus(sum, m[lane]);
  return sum;
}

// The integer of one sum of products.
uint8_t rescaled(const Rescale& r, int32_t sum, float scale) {
  const Vec v = clamp(broadcast(float(sum) * scale), -r.zero, r.high);
  return uint8_t(plus(round(v)[0], int32_t(r.zero)));
}

}  // namespace

bool int8_is_fast() {
  static const bool is_fast = Fast::runs_here();
  return is_fast && !slow_int8;
}

TileFunction find_int8_tile(int64_t group, int64_t vectors, int64_t rows, int64_t stride_x) {
  return int8_is_fast() ? pick_tile<Int8<Fast>>(group, vectors, rows, stride_x)
                        : pick_tile<Int8<Plain>>(group, vectors, rows, stride_x);
}

void quant_input(const Op& op, const float* image, float* arena, int64_t y0, int64_t y1) {
  const int64_t pixels = op.height * op.width;
  const float zero = op.rescale->zero;
  const Vec scale = broadcast(op.scales[0]), fill = filler(op.fill);
  for (int64_t y = y0; y < y1; ++y) {
    const int32_t left = int32_t(pixels - y * op.width);  // pixels from row y on
    for (int64_t c = 0; c < op.channels; ++c) {
      const float* in = image + c * kPacked * pixels + y * op.width;
      float* out = arena + op.out + y * op.out_row + c * op.out_plane;
      const int64_t count = std::min(kPacked, op.in_channels - c * kPacked);
      for (int64_t i = 0; i < op.vectors * kLanes; i += kLanes) {
        Mask place = load_mask(op.offsets + i);
        place |= place >= left;  // -1 below the image
        Mask packed{};
        for (int64_t j = 0; j < count; ++j) {
          packed |= steps_of(gather(in + j * pixels, place), scale, zero) << int(j * kBits);
        }
        store(out + i, choose(place >= 0, as_vec(packed), fill));
      }
    }
  }
  fill_halo(op, arena + op.out, y0, y1, 0, op.channels);
}

void quantize(const Op& op, float* arena, int64_t c0, int64_t c1, int64_t y0, int64_t y1) {
  const float zero = op.rescale->zero;
  const Vec scale = broadcast(op.scales[0]), fill = filler(op.fill);
  for (int64_t y = y0; y < y1; ++y) {
    const int32_t* mask = op.mask ? op.mask + y * op.mask_row : nullptr;
    for (int64_t c = c0; c < c1; ++c) {
      const float* in = arena + op.in + y * op.in_row + c * kPacked * op.in_plane;
      float* out = arena + op.out + y * op.out_row + c * op.out_plane;
      const int64_t count = std::min(kPacked, op.in_channels - c * kPacked);
      for (int64_t i = 0; i < op.vectors * kLanes; i += kLanes) {
        Mask packed{};
        for (int64_t j = 0; j < count; ++j) {
          packed |= steps_of(load(in + j * op.in_plane + i), scale, zero) << int(j * kBits);
        }
        store(out + i, mask ? choose(load_mask(mask + i), as_vec(packed), fill) : as_vec(packed));
      }
    }
  }
  fill_halo(op, arena + op.out, y0, y1, c0, c1);
}

void quantize_vector(const Op& op, float* arena) {
  const float zero = op.rescale->zero;
  const Vec scale = broadcast(op.scales[0]);
  auto* out = reinterpret_cast<uint8_t*>(arena + op.out);
  for (int64_t c = 0; c < op.in_channels; ++c) {
    out[c] = uint8_t(steps_of(broadcast(arena[op.in + c]), scale, zero)[0]);
  }
}

void quant_max_pool(const Op& op, float* arena, int64_t y0, int64_t y1) {
  typedef uint8_t Bytes __attribute__((vector_size(kLanes * 4)));
  const Vec fill = filler(op.fill);
  const int32_t* valid_rows = op.offsets + op.width * kLanes;
  for (int64_t y = y0; y < y1; ++y) {
    for (int64_t c = 0; c < op.channels; ++c) {
      const float* in = arena + op.in + c * op.in_plane;
      float* out = arena + op.out + y * op.out_row + c * op.out_plane;
      for (int64_t i = 0; i < op.vectors; ++i) {
        Bytes best{};  // the lowest of all, in every lane outside the image, too
        for (int64_t dy = 0; dy < op.window_y; ++dy) {
          const int64_t row = y * op.stride_y + dy, first = i * op.stride_x;
          const Mask valid_row = load_mask(valid_rows + row * kLanes);
          const float* p = in + (row - op.pad_y) * op.in_row + (first - op.pad_x) * kLanes;
          const int32_t* valid = op.offsets + first * kLanes;
          for (int64_t dx = 0; dx < op.window_x; ++dx) {
            const Mask kept = load_mask(valid + dx * kLanes) & valid_row;
            const Bytes v = reinterpret_cast<Bytes>(keep(load(p + dx * kLanes), kept));
            best = v > best ? v : best;
          }
        }
        Vec found = reinterpret_cast<Vec>(best);
        if (op.mask) found = choose(load_mask(op.mask + y * op.mask_row + i * kLanes), found, fill);
        store(out + i * kLanes, found);
      }
    }
  }
  fill_halo(op, arena + op.out, y0, y1, 0, op.channels);
}

void quant_lookup(const Op& op, float* arena, int64_t y0, int64_t y1) {
  const auto* table = reinterpret_cast<const uint8_t*>(op.weights);
  for (int64_t y = y0; y < y1; ++y) {
    for (int64_t c = 0; c < op.channels; ++c) {
      const auto* in =
          reinterpret_cast<const uint8_t*>(arena + op.in + y * op.in_row + c * op.in_plane);
      auto* out = reinterpret_cast<uint8_t*>(arena + op.out + y * op.out_row + c * op.out_plane);
      for (int64_t i = 0; i < op.vectors * kLanes * kPacked; ++i) out[i] = table[in[i]];
    }
  }
  fill_halo(op, arena + op.out, y0, y1, 0, op.channels);
}

void quant_mean_pool(const Op& op, const float* arena, float* out, int64_t c0, int64_t c1) {
  const Rescale& r = *op.rescale;
  // Lanes outside the image have the zero point as well, and add nothing after all.
  const float scale = op.scales[0] / (op.scales[1] * float(op.depth));
  const uint32_t zeros = uint32_t(op.height * op.vectors * kLanes) * uint32_t(word_at(op.bias));
  auto* to = reinterpret_cast<uint8_t*>(out);
  for (int64_t c = c0; c < c1; ++c) {
    const float* in = arena + op.in + c * op.in_plane;
    Mask sum[kPacked] = {};
    for (int64_t y = 0; y < op.height; ++y) {
      for (int64_t i = 0; i < op.vectors; ++i) {
        const Mask x = bits(load(in + y * op.in_row + i * kLanes));
        for (int j = 0; j < kPacked; ++j) sum[j] = plus(sum[j], (x >> (j * kBits)) & kByte);
      }
    }
    for (int j = 0; j < kPacked; ++j) {
      to[c * kPacked + j] = rescaled(r, plus(sum_lanes(sum[j]), int32_t(0u - zeros)), scale);
    }
  }
}

namespace {

template <typename D>
void linear(const Op& op, const float* arena, float* out, int64_t c0, int64_t c1) {
  const float* x = arena + op.in;
  auto* to = reinterpret_cast<uint8_t*>(out);
  for (int64_t c = c0; c < c1; ++c) {
    const float* w = op.weights + c * op.depth;
    Mask sums[4] = {};
    int64_t k = 0;
    const auto add = [&](Mask& sum, int64_t at) SPARSE_INLINE {
      sum = D::dot(sum, bits(load(x + at)), D::split(bits(load(w + at))));
    };
    for (; k + 4 * kLanes <= op.depth; k += 4 * kLanes) {
      for (int j = 0; j < 4; ++j) add(sums[j], k + j * kLanes);
    }
    for (; k < op.depth; k += kLanes) add(sums[0], k);
    const int32_t sum =
        plus(sum_lanes(plus(plus(sums[0], sums[1]), plus(sums[2], sums[3]))), first_sum<D>(op, c));
    if (op.rescale) to[c] = rescaled(*op.rescale, sum, op.scales[c]);
    else out[c] = float(sum) * op.scales[c];
  }
  if (!op.rescale) activate(op.activation, out + c0, c1 - c0);
}

}  // namespace

void quant_linear(const Op& op, const float* arena, float* out, int64_t c0, int64_t c1) {
  (int8_is_fast() ? linear<Fast> : linear<Plain>)(op, arena, out, c0, c1);
}

}  // namespace sparse_runtime
