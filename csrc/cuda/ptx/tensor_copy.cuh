// Copies of boxes of a tensor into shared memory, by the copy engine. PTX ISA, "Data Movement and
// Conversion: cp.async.bulk.tensor". Coordinates count elements, the innermost dimension first;
// what lies outside of the tensor becomes zero. sm_90.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "mbarrier.cuh"

namespace hisa::cuda::ptx {

__device__ __forceinline__ void copy_box(void* to, const CUtensorMap& tensor, Barrier& done,
                                         int32_t x) {
  asm volatile(
      "cp.async.bulk.tensor.1d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3}], [%2];" ::"r"(shared_address(to)),
      "l"(&tensor), "r"(shared_address(&done)), "r"(x)
      : "memory");
}

__device__ __forceinline__ void copy_box(void* to, const CUtensorMap& tensor, Barrier& done,
                                         int32_t x, int32_t y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4}], [%2];" ::"r"(shared_address(to)),
      "l"(&tensor), "r"(shared_address(&done)), "r"(x), "r"(y)
      : "memory");
}

__device__ __forceinline__ void copy_box(void* to, const CUtensorMap& tensor, Barrier& done,
                                         int32_t x, int32_t y, int32_t z) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5}], [%2];" ::"r"(shared_address(to)),
      "l"(&tensor), "r"(shared_address(&done)), "r"(x), "r"(y), "r"(z)
      : "memory");
}

// True for one lane of the warp, of which the compiler then knows that it is alone. All lanes call
// it.
__device__ __forceinline__ bool elect() {
  uint32_t elected;
  asm volatile("{ .reg .pred p; elect.sync _|p, 0xffffffff; selp.u32 %0, 1, 0, p; }"
               : "=r"(elected));
  return elected != 0;
}

}  // namespace hisa::cuda::ptx
