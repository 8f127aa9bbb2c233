// Copies from global to shared memory that pass no register. PTX ISA, "Data Movement and
// Conversion: cp.async". A thread waits for its own copies only, and may then read what it copied
// itself.
#pragma once

#include <cstdint>

namespace hisa::cuda::ptx {

// 16 bytes, or zeros if not `real`; both addresses are multiples of 16.
__device__ __forceinline__ void copy_16(uint32_t shared, const void* global, bool real) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global),
               "r"(real ? 16 : 0)
               : "memory");
}

// 4 bytes; both addresses are multiples of 4.
__device__ __forceinline__ void copy_4(uint32_t shared, const void* global) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared), "l"(global) : "memory");
}

// All copies since the last call belong together.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;"); }

// Wait until no more than `pending` of the last groups are under way.
template <int pending>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

}  // namespace hisa::cuda::ptx
