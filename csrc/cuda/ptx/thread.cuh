// The number of a thread, and barriers of some threads.
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

// The same value, but the compiler computes what follows from it here, and not before a loop.
__device__ __forceinline__ float here(float x) {
  asm volatile("" : "+f"(x));
  return x;
}
__device__ __forceinline__ const char* here(const char* x) {
  asm volatile("" : "+l"(x));
  return x;
}

// A barrier of some threads of a block. PTX ISA, "Parallel Synchronization: bar.sync".
template <int kThreads>
__device__ __forceinline__ void sync_some() {
  asm volatile("bar.sync 1, %0;" ::"n"(kThreads) : "memory");
}

}  // namespace hisa::cuda::ptx
