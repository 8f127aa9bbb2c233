// From fp32 to the dtypes of keys and queries.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Float8_e4m3fn.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>

#include "../params.h"

namespace hisa::cpu {

template <class T>
void narrow(const float* source, void* target, int64_t n) {
  for (int64_t i = 0; i < n; ++i) static_cast<T*>(target)[i] = static_cast<T>(source[i]);
}

inline void narrow(ElementType type, const float* source, void* target, int64_t n) {
  switch (type) {
    case ElementType::kFloat32: return narrow<float>(source, target, n);
    case ElementType::kBFloat16: return narrow<c10::BFloat16>(source, target, n);
    case ElementType::kFloat16: return narrow<c10::Half>(source, target, n);
    case ElementType::kFloat8E4M3: return narrow<c10::Float8_e4m3fn>(source, target, n);
  }
}

// max(amax / 448, 1e-10); a NaN anywhere makes it NaN, as torch.amax and torch.clamp do.
inline float fp8_scale(const float* values, int64_t n) {
  constexpr float kFp8Max = 448.0F;
  constexpr float kMinScale = 1e-10F;
  float amax = 0.0F;
  for (int64_t i = 0; i < n; ++i) {
    const float magnitude = std::fabs(values[i]);
    if (magnitude > amax || std::isnan(magnitude)) amax = magnitude;
  }
  const float scale = amax / kFp8Max;
  return scale < kMinScale ? kMinScale : scale;
}

}  // namespace hisa::cpu
