// Addresses of rows. PTX ISA, "Integer Arithmetic Instructions: mul".
#pragma once

#include <cstdint>

namespace hisa::cuda::ptx {

// base + index * stride, in bytes. Written in C++ it takes two instructions more.
__device__ __forceinline__ const char* row_at(const char* base, uint32_t index, uint32_t stride) {
  uint64_t distance;
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(distance) : "r"(index), "r"(stride));
  return base + distance;
}

}  // namespace hisa::cuda::ptx
