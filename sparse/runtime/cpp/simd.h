// Vectors of kLanes floats, written with the vector extensions of GCC and Clang. One source serves
// AVX2, AVX-512, NEON and machines without any of them. library.py sets SPARSE_LANES.
#pragma once

#include <cstdint>
#include <utility>
#ifdef __AVX2__
#include <immintrin.h>
#endif

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
// The larger one. A NaN in `a` stays a NaN, as in torch.
inline Vec maximum(Vec a, Vec b) { return b > a ? b : a; }

// The smaller one. A NaN in `a` stays a NaN.
inline Vec minimum(Vec a, Vec b) { return b < a ? b : a; }

// The larger one, or a NaN if either is one.
inline Vec larger(Vec a, Vec b) { return ((a > b) | (a != a)) ? a : b; }

// Keep a value in a register. GCC may otherwise load it again for every use. A vector that is larger
// than a register stays where it is.
inline void hold(Vec& v) {
#if defined(__AVX512F__) || (defined(__AVX__) && SPARSE_LANES == 8) || \
    (defined(__x86_64__) && SPARSE_LANES == 4)
  asm("" : "+v"(v));
#elif defined(__aarch64__) && SPARSE_LANES == 4
  asm("" : "+w"(v));
#else
  (void)v;
#endif
}

// Zero the lanes where the mask is 0. All bits of the other lanes of the mask are set.
inline Vec keep(Vec v, Mask m) { return reinterpret_cast<Vec>(reinterpret_cast<Mask>(v) & m); }

// Lanes of `a` where all bits of the mask are set, and of `b` where none is.
inline Vec choose(Mask m, Vec a, Vec b) {
  return reinterpret_cast<Vec>((reinterpret_cast<Mask>(a) & m) | (reinterpret_cast<Mask>(b) & ~m));
}

// e^x with a relative error of 2e-7; x is limited to the range in which the result is normal.
inline Vec exponential(Vec x) {
  x = minimum(maximum(x, broadcast(-87.3f)), broadcast(88.3f));
  // e^x = 2^n e^r with |r| <= log(2) / 2. Adding 1.5 * 2^23 rounds to the integer n, in the low bits.
  const Vec shift = broadcast(12582912.0f);
  const Vec shifted = x * broadcast(1.44269504f) + shift;
  const Vec n = shifted - shift;
  const Vec r = (x - n * broadcast(0.693359375f)) + n * broadcast(2.12194440e-4f);
  Vec p = broadcast(1.9875691500e-4f);  // the polynomial of Cephes' expf
  p = p * r + broadcast(1.3981999507e-3f);
  p = p * r + broadcast(8.3334519073e-3f);
  p = p * r + broadcast(4.1665795894e-2f);
  p = p * r + broadcast(1.6666665459e-1f);
  p = p * r + broadcast(5.0000001201e-1f);
  p = p * (r * r) + r + broadcast(1.0f);
  typedef uint32_t Bits __attribute__((vector_size(kLanes * 4)));
  const Bits scale = (reinterpret_cast<Bits>(shifted) << 23) + 0x3f800000u;
  return p * reinterpret_cast<Vec>(scale);
}

// The complementary error function for x >= 0, with a relative error of 5e-7 where it is above
// 1e-3, by the Chebyshev fit of erfcc (Press et al., Numerical Recipes).
inline Vec erfc_positive(Vec x) {
  const Vec t = broadcast(1.0f) / (broadcast(1.0f) + broadcast(0.5f) * x);
  Vec p = broadcast(0.17087277f);
  p = p * t + broadcast(-0.82215223f);
  p = p * t + broadcast(1.48851587f);
  p = p * t + broadcast(-1.13520398f);
  p = p * t + broadcast(0.27886807f);
  p = p * t + broadcast(-0.18628806f);
  p = p * t + broadcast(0.09678418f);
  p = p * t + broadcast(0.37409196f);
  p = p * t + broadcast(1.00002368f);
  p = p * t + broadcast(-1.26551223f);
  return t * exponential(p - x * x);
}

// Lane l of the result is base[index[l]], or zero if the index is negative.
inline Vec gather(const float* base, Mask index) {
#if defined(__AVX512F__) && SPARSE_LANES == 16
  const __m512i lanes = reinterpret_cast<__m512i>(index);
  const __mmask16 valid = _mm512_cmpge_epi32_mask(lanes, _mm512_setzero_si512());
  return _mm512_mask_i32gather_ps(_mm512_setzero_ps(), valid, lanes, base, 4);
#elif defined(__AVX2__) && SPARSE_LANES == 8
  const __m256 valid = reinterpret_cast<__m256>(index >= 0);
  return _mm256_mask_i32gather_ps(_mm256_setzero_ps(), base, reinterpret_cast<__m256i>(index),
                                  valid, 4);
#else
  Vec found;
  for (int lane = 0; lane < kLanes; ++lane) {
    found[lane] = index[lane] < 0 ? 0.0f : base[index[lane]];
  }
  return found;
#endif
}

// Four bytes of one value in every lane.
inline Vec filler(int64_t byte) {
  return reinterpret_cast<Vec>(Mask{} + int32_t(uint32_t(byte) * 0x01010101u));
}

// Lane l of the result is lane from[l] of `v`, or that of `fill` if from[l] is negative.
inline Vec permute(Vec v, const int32_t* from, Vec fill) {
  const Mask index = load_mask(from);
#ifdef __clang__
  Vec moved;
  for (int lane = 0; lane < kLanes; ++lane) moved[lane] = v[index[lane] & (kLanes - 1)];
#else
  const Vec moved = __builtin_shuffle(v, index);
#endif
  return choose(index >= 0, moved, fill);
}

// Lanes kFirst, kFirst + 1, .. of `low` followed by `high`.
template <int kFirst, int... L>
inline Vec window(Vec low, Vec high, std::integer_sequence<int, L...>) {
#ifdef __clang__
  return __builtin_shufflevector(low, high, (kFirst + L)...);
#else
  return __builtin_shuffle(low, high, Mask{(kFirst + L)...});
#endif
}

// Move every lane up (down) by one place; a lane of `fill` takes the free one.
inline Vec move_up(Vec v, Vec fill) {
  return window<kLanes - 1>(fill, v, std::make_integer_sequence<int, kLanes>());
}
inline Vec move_down(Vec v, Vec fill) {
  return window<1>(v, fill, std::make_integer_sequence<int, kLanes>());
}

}  // namespace sparse_runtime
