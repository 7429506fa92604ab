#include "activation.h"

#include <algorithm>
#include <cstring>

#include "simd.h"

namespace sparse_runtime {
namespace {

Vec relu6(Vec x) { return minimum(maximum(x, Vec{}), broadcast(6.0f)); }

Vec hardsigmoid(Vec x) { return relu6(x + broadcast(3.0f)) * broadcast(1.0f / 6.0f); }

Vec sigmoid(Vec x) { return broadcast(1.0f) / (broadcast(1.0f) + exponential(-x)); }

// x times the normal distribution's cumulative function.
Vec gelu(Vec x) {
  const Vec tail = broadcast(0.5f) * erfc_positive(maximum(x, -x) * broadcast(0.70710678f));
  return x * (x > Vec{} ? broadcast(1.0f) - tail : tail);
}

// 0.5 x (1 + tanh(u)) = x sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3)
Vec gelu_tanh(Vec x) {
  return x * sigmoid(broadcast(1.59576912f) * (x + broadcast(0.044715f) * x * x * x));
}

// Near 0 the polynomial of Cephes' tanhf, which keeps the digits of small numbers.
Vec tanh(Vec x) {
  const Vec z = x * x;
  Vec p = broadcast(-5.70498872745e-3f);
  p = p * z + broadcast(2.06390887954e-2f);
  p = p * z + broadcast(-5.37397155531e-2f);
  p = p * z + broadcast(1.33314422036e-1f);
  p = p * z + broadcast(-3.33332819422e-1f);
  const Vec far = broadcast(2.0f) * sigmoid(broadcast(2.0f) * x) - broadcast(1.0f);
  return z < broadcast(0.390625f) ? p * z * x + x : far;
}

// Call `use` with the function of an activation; the choice is thus outside of all loops.
template <typename F>
void with_function(int64_t activation, F use) {
  switch (activation) {
    case kRelu: return use([](Vec x) { return maximum(x, Vec{}); });
    case kRelu6: return use([](Vec x) { return relu6(x); });
    case kSilu: return use([](Vec x) { return x * sigmoid(x); });
    case kHardswish: return use([](Vec x) { return x * hardsigmoid(x); });
    case kHardsigmoid: return use([](Vec x) { return hardsigmoid(x); });
    case kSigmoid: return use([](Vec x) { return sigmoid(x); });
    case kGelu: return use([](Vec x) { return gelu(x); });
    case kGeluTanh: return use([](Vec x) { return gelu_tanh(x); });
    case kTanh: return use([](Vec x) { return tanh(x); });
    default: return;
  }
}

}  // namespace

void activate_tile(const Op& op, float* out, const int32_t* mask, int64_t rows, int64_t vectors) {
  with_function(op.activation, [&](auto function) {
    for (int64_t y = 0; y < rows; ++y) {
      for (int64_t i = 0; i < vectors * kLanes; i += kLanes) {
        Vec v = function(load(out + y * op.out_row + i));
        if (mask) v = keep(v, load_mask(mask + y * op.mask_row + i));
        store(out + y * op.out_row + i, v);
      }
    }
  });
}

void activate(int64_t activation, float* values, int64_t count) {
  with_function(activation, [&](auto function) {
    for (int64_t i = 0; i < count; i += kLanes) {
      const size_t bytes = size_t(std::min<int64_t>(kLanes, count - i)) * sizeof(float);
      Vec v{};
      std::memcpy(&v, values + i, bytes);
      v = function(v);
      std::memcpy(values + i, &v, bytes);
    }
  });
}

}  // namespace sparse_runtime
