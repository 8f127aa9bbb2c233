// How kernels follow one another: "programmatic dependent launch". PTX ISA, "Parallel
// Synchronization and Communication Instructions: griddepcontrol". sm_90; nothing before that,
// where no kernel may be launched so that it overlaps another.
#pragma once

namespace hisa::cuda::ptx {

// Wait until the kernel before this one has written all it writes.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// The kernel behind this one may start, as far as there is room.
__device__ __forceinline__ void let_next_kernel_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

}  // namespace hisa::cuda::ptx
