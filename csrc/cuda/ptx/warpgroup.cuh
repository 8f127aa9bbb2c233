// What four consecutive warps do together. PTX ISA, "Miscellaneous Instructions: setmaxnreg".
// sm_90a.
#pragma once

#include <cstdint>

namespace hisa::cuda::ptx {

// Registers of each thread of the warpgroup from here on, and those at the start. One that gets
// more waits for others to give theirs back.
template <int kStart, int kCount>
__device__ __forceinline__ void set_registers() {
  if constexpr (kCount > kStart)
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
  else
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}

// A barrier of the threads of one of a block's warpgroups, 0 to 7.
__device__ __forceinline__ void sync_warpgroup(uint32_t number) {
  asm volatile("bar.sync %0, 128;" ::"r"(number + 1) : "memory");
}

}  // namespace hisa::cuda::ptx
