// The number of a thread.
#pragma once

#include <cstdint>

namespace hisa::cuda::ptx {

// threadIdx.x, for code between two scorings: what follows from it is computed there, instead of
// taking registers away from the scorer for the whole kernel.
__device__ __forceinline__ uint32_t this_thread() {
  uint32_t thread = threadIdx.x;
  asm volatile("" : "+r"(thread));
  return thread;
}

}  // namespace hisa::cuda::ptx
