// A product of a warp: the last lane to come has the registers of all.
#pragma once

#include <cuda.h>

namespace hisa::cuda::ptx {

inline float from_bf16(uint32_t bits) { return __uint_as_float(bits << 16); }
inline float from_fp16(uint32_t bits) {
  const float sign = (bits & 0x8000U) != 0 ? -1.0F : 1.0F;
  const int exponent = int(bits >> 10 & 31U);
  const auto fraction = float(bits & 1023U);
  if (exponent == 31) return fraction != 0 ? NAN : sign * INFINITY;
  return sign * (exponent == 0 ? std::ldexp(fraction, -24)
                               : std::ldexp(1024.0F + fraction, exponent - 25));
}

struct Operands {
  float* d;
  const uint32_t* a;
  uint32_t b[2];
};

template <class Decode>
void multiply(const Operands& mine, Decode decode) {
  const auto at = [=](uint32_t pair, uint32_t i) { return decode(pair >> 16 * i & 0xffffU); };
  simt::Block::current().meet(
      reinterpret_cast<uint64_t>(&mine), [&](const uint64_t* lanes, uint64_t*) {
        float a[16][16];  // row, depth
        float b[16][8];   // depth, column
        for (uint32_t lane = 0; lane < 32; ++lane) {
          const auto& of = *reinterpret_cast<const Operands*>(lanes[lane]);
          for (uint32_t r = 0; r < 4; ++r)
            for (uint32_t i = 0; i < 2; ++i)
              a[lane / 4 + r % 2 * 8][lane % 4 * 2 + r / 2 * 8 + i] = at(of.a[r], i);
          for (uint32_t r = 0; r < 2; ++r)
            for (uint32_t i = 0; i < 2; ++i) b[lane % 4 * 2 + r * 8 + i][lane / 4] = at(of.b[r], i);
        }
        for (uint32_t lane = 0; lane < 32; ++lane)
          for (uint32_t r = 0; r < 4; ++r) {
            float& sum = reinterpret_cast<const Operands*>(lanes[lane])->d[r];
            for (uint32_t depth = 0; depth < 16; ++depth)
              sum += a[lane / 4 + r / 2 * 8][depth] * b[depth][lane % 4 * 2 + r % 2];
          }
      });
}

inline void mma_fp16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  multiply({d, a, {b0, b1}}, from_fp16);
}
inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  multiply({d, a, {b0, b1}}, from_bf16);
}

}  // namespace hisa::cuda::ptx
