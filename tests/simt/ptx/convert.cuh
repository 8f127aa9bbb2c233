#pragma once

#include <cuda.h>

namespace hisa::cuda::ptx {

inline constexpr bool kFp8Cvt = true;

// All of these values are normal in fp16, or zero, or NaN.
inline uint32_t widen_e4m3(uint32_t byte) {
  const uint32_t sign = (byte & 0x80U) << 8;
  const uint32_t magnitude = byte & 0x7fU;
  if (magnitude == 0x7fU) return sign | 0x7fffU;
  const float x = magnitude >= 8 ? std::ldexp(8.0F + magnitude % 8, int(magnitude / 8) - 10)
                                 : std::ldexp(float(magnitude), -9);
  const uint32_t bits = __float_as_uint(x);
  return sign | (x == 0 ? 0 : (bits >> 13) - (112U << 10));
}
inline void widen_e4m3(uint32_t four, uint32_t (&pairs)[2]) {
  for (int i = 0; i < 2; ++i, four >>= 16)
    pairs[i] = widen_e4m3(four & 0xffU) | widen_e4m3(four >> 8 & 0xffU) << 16;
}

}  // namespace hisa::cuda::ptx
