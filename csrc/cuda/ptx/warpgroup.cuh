// What four consecutive warps do together, and how kernels follow one another. PTX ISA,
// "Miscellaneous Instructions: setmaxnreg" and "Parallel Synchronization: griddepcontrol". sm_90a.
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

// Wait until the kernel before this one has written all it writes.
__device__ __forceinline__ void wait_for_previous_kernel() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
}
// The kernel behind this one may start, as far as there is room.
__device__ __forceinline__ void let_next_kernel_start() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

}  // namespace hisa::cuda::ptx
