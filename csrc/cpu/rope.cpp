// A head at a time: widened to fp32, turned with the roundings of its type, quantised.
//
//   y[c] = x[own] * cos[angle] + (other's sign) x[other] * sin[angle]
//
// Products and sum are rounded to the type of x one by one, as separate operators of a model would.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>

#include "around.h"
#include "kernels.h"
#include "narrow.h"

namespace hisa::cpu {
namespace {

using Head = std::array<float, kMaxDim>;

// Where RoPE finds the two values of a turned channel.
struct Turn {
  int64_t own, other, angle;
  bool minus;  // the product with sin is subtracted

  // For channel c of `turned`. Interleaved pairs come out de-interleaved: first the even ones.
  static Turn of(int64_t c, int64_t turned, bool interleaved) {
    const int64_t half = turned / 2;
    const bool lower = c < half;
    const int64_t pair = lower ? c : c - half;
    if (interleaved) return {2 * pair + (lower ? 0 : 1), 2 * pair + (lower ? 1 : 0), pair, lower};
    return {c, lower ? c + half : c - half, c, lower};
  }
};

// x as an element of `type`, in fp32.
template <class T>
float rounded(float x) {
  return static_cast<float>(static_cast<T>(x));
}

template <class T>
void turn(const RopeParams& params, int64_t angles, const float* x, float* y) {
  const T* const cos = static_cast<const T*>(params.cos) + angles;
  const T* const sin = static_cast<const T*>(params.sin) + angles;
  for (int64_t c = 0; c < params.turned; ++c) {
    const Turn turn = Turn::of(c, params.turned, params.interleaved);
    const float straight = rounded<T>(x[turn.own] * static_cast<float>(cos[turn.angle]));
    const float across = rounded<T>(x[turn.other] * static_cast<float>(sin[turn.angle]));
    y[c] = rounded<T>(turn.minus ? straight - across : straight + across);
  }
}

// Turn channels of a head, with the angles from element `angles` on.
void turn(const RopeParams& params, int64_t angles, Head& head) {
  if (params.turned == 0) return;
  Head turned;
  float* const x = head.data() + params.first;
  switch (params.type) {
    case ElementType::kBFloat16: turn<c10::BFloat16>(params, angles, x, turned.data()); break;
    case ElementType::kFloat16: turn<c10::Half>(params, angles, x, turned.data()); break;
    default: turn<float>(params, angles, x, turned.data()); break;
  }
  std::copy_n(turned.data(), params.turned, x);
}

// The least power of two that is no smaller; infinity and NaN as they are.
float raise_to_power_of_two(float scale) {
  if (!std::isfinite(scale)) return scale;
  int exponent = 0;  // scale = mantissa * 2 ** exponent, the mantissa from 0.5 on
  const float mantissa = std::frexp(scale, &exponent);
  return std::ldexp(1.0F, exponent - static_cast<int>(mantissa == 0.5F));
}

}  // namespace

void rope(const RopeParams& params, int64_t begin, int64_t end) {
  const int64_t width = element_size(params.type);
  const ElementType target = params.quantize ? ElementType::kFloat8E4M3 : params.type;
  const auto* const x = static_cast<const std::byte*>(params.x);
  auto* const y = static_cast<std::byte*>(params.y);
  Head head;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t angles =
        row / params.rows * params.angle_stride + row % params.rows * params.turned;
    for (int64_t i = row * params.heads; i < (row + 1) * params.heads; ++i) {
      kernels().widen(params.type, x + i * params.dim * width, head.data(), params.dim);
      turn(params, angles, head);
      if (params.quantize) {
        float scale = fp8_scale(head.data(), params.dim);
        if (params.power_of_two) scale = raise_to_power_of_two(scale);
        for (int64_t d = 0; d < params.dim; ++d) head[static_cast<size_t>(d)] /= scale;
        params.scale[i] = scale;
      }
      narrow(target, head.data(), y + i * params.dim * element_size(target), params.dim);
    }
  }
}

}  // namespace hisa::cpu
