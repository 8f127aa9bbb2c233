// A product is computed when it is waited for, so what it reads must still be there by then.
// Operands are not swizzled.
#pragma once

#include <cuda.h>

#include <vector>

#include "shared.cuh"

namespace hisa::cuda::ptx {

struct Product {
  float* d;
  int columns;
  uint64_t a, b;
  bool add;
  bool fp8;
};
struct Products {
  std::vector<Product> open;
  std::vector<std::vector<Product>> groups;
};
inline Products& products() {
  static std::map<std::pair<const void*, uint32_t>, Products> all;
  auto& block = simt::Block::current();
  return all[{&block, block.thread().index}];
}

template <int kPitch>
uint64_t describe(uint32_t address) {
  return address / 16 | uint64_t{kPitch} << 32;
}

template <int kPitch>
uint32_t swizzled(uint32_t row, uint32_t piece) {
  return row * kPitch + piece * 16;
}

inline float decode(const char* at, int i, bool fp8) {
  if (!fp8) {
    uint16_t bits;
    std::memcpy(&bits, at + 2 * i, 2);
    return std::bit_cast<float>(uint32_t{bits} << 16);
  }
  const auto bits = static_cast<uint8_t>(at[i]);
  const int exponent = bits >> 3 & 15;
  const int mantissa = bits & 7;
  const float size = exponent == 15 && mantissa == 7 ? NAN
                     : exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -9)
                                     : std::ldexp(static_cast<float>(8 + mantissa), exponent - 10);
  return bits >> 7 != 0 ? -size : size;
}

inline void compute(const Product& p, uint32_t thread) {
  const uint32_t lane = thread % 32;
  const uint32_t warp = thread / 32 % 4;
  const auto pitch = static_cast<int64_t>(p.a >> 32);
  const char* a = sm90::start + (p.a & 0xffffffffU) * 16;
  const char* b = sm90::start + (p.b & 0xffffffffU) * 16;
  const int length = p.fp8 ? 32 : 16;
  for (int i = 0; i < p.columns / 2; ++i) {
    const auto row = static_cast<int64_t>(16 * warp + lane / 4 + i / 2 % 2 * 8);
    const auto column = static_cast<int64_t>(i / 4 * 8 + 2 * (lane % 4) + i % 2);
    float sum = p.add ? p.d[i] : 0.0F;
    for (int j = 0; j < length; ++j)
      sum += decode(a + row * pitch, j, p.fp8) * decode(b + column * pitch, j, p.fp8);
    p.d[i] = sum;
  }
}

inline void fence_products() {}
inline void commit_products() {
  Products& mine = products();
  mine.groups.push_back(std::move(mine.open));
  mine.open.clear();
}
template <int pending>
void wait_for_products() {
  Products& mine = products();
  simt::Block::current().wait([] { return true; });
  while (mine.groups.size() > pending) {
    for (const Product& p : mine.groups.front()) compute(p, threadIdx.x);
    mine.groups.erase(mine.groups.begin());
  }
}
template <int kCount>
void pin(float (&)[kCount]) {}

template <int kHalf>
void wgmma_e4m3(float (&d)[kHalf], uint64_t a, uint64_t b, bool add) {
  products().open.push_back({d, 2 * kHalf, a, b, add, true});
}
template <int kHalf>
void wgmma_bf16(float (&d)[kHalf], uint64_t a, uint64_t b, bool add) {
  products().open.push_back({d, 2 * kHalf, a, b, add, false});
}

}  // namespace hisa::cuda::ptx
