// Shared memory by its own 32-bit addresses, which leave a loop nothing to compute. PTX ISA,
// "Data Movement and Conversion: ld, st".
#pragma once

#include <cstdint>

namespace hisa::cuda::ptx {

// The address of an object in shared memory.
__device__ __forceinline__ uint32_t shared_address(const void* object) {
  auto address = static_cast<uint32_t>(__cvta_generic_to_shared(object));
  asm volatile("" : "+r"(address));  // kept in a register, not derived anew
  return address;
}

// 16 bytes, aligned.
__device__ __forceinline__ uint4 load_16(uint32_t address) {
  uint4 x;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "r"(address)
               : "memory");
  return x;
}

__device__ __forceinline__ float load_float(uint32_t address) {
  float x;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(x) : "r"(address) : "memory");
  return x;
}

__device__ __forceinline__ void store_float(uint32_t address, float x) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(x) : "memory");
}

}  // namespace hisa::cuda::ptx
