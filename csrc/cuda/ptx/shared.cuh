// Shared memory by its own 32-bit addresses, which leave a loop nothing to compute. PTX ISA,
// "Data Movement and Conversion: ld, st".
#pragma once

#include <bit>
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

// 4 or 8 bytes, aligned.
template <class T>
__device__ __forceinline__ void store(uint32_t address, T x) {
  if constexpr (sizeof(T) == 8)
    asm volatile("st.shared.u64 [%0], %1;" ::"r"(address), "l"(std::bit_cast<uint64_t>(x))
                 : "memory");
  else
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(std::bit_cast<uint32_t>(x))
                 : "memory");
}
template <class T>
__device__ __forceinline__ T load(uint32_t address) {
  if constexpr (sizeof(T) == 8) {
    uint64_t x;
    asm volatile("ld.shared.u64 %0, [%1];" : "=l"(x) : "r"(address) : "memory");
    return std::bit_cast<T>(x);
  } else {
    uint32_t x;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(x) : "r"(address) : "memory");
    return std::bit_cast<T>(x);
  }
}

// 4 bytes, if `wanted`, without a branch.
template <class T>
__device__ __forceinline__ void store_if(bool wanted, uint32_t to, T x) {
  asm volatile("{ .reg .pred p; setp.ne.u32 p, %2, 0; @p st.shared.b32 [%0], %1; }" ::"r"(to),
               "r"(std::bit_cast<uint32_t>(x)), "r"(static_cast<uint32_t>(wanted))
               : "memory");
}

// An array of elements of 4 bytes in shared memory, which begins at a multiple of 16.
template <class T>
struct SharedArray {
  uint32_t address;

  __device__ __forceinline__ explicit SharedArray(const T* data) : address(shared_address(data)) {}
  // The four from i on; i is a multiple of 4.
  __device__ __forceinline__ void load_4(uint32_t i, T (&x)[4]) const {
    const uint4 four = load_16(address + i * 4);
    x[0] = std::bit_cast<T>(four.x), x[1] = std::bit_cast<T>(four.y);
    x[2] = std::bit_cast<T>(four.z), x[3] = std::bit_cast<T>(four.w);
  }
  __device__ __forceinline__ void skip(uint32_t n) { address += n * 4; }
  __device__ __forceinline__ T load(uint32_t i) const { return ptx::load<T>(address + i * 4); }
  // Write those of x whose bits are set, one behind the other, without a branch. All addresses come
  // first: the register of one cannot change until its store has read it.
  __device__ __forceinline__ void push_4(uint32_t wanted, const T (&x)[4]) const {
    asm volatile(
        "{ .reg .pred p0, p1, p2, p3; .reg .u32 bit, size, a1, a2, a3; "
        "and.b32 bit, %1, 1; setp.ne.u32 p0, bit, 0; selp.u32 size, 4, 0, p0; add.u32 a1, %0, "
        "size; "
        "and.b32 bit, %1, 2; setp.ne.u32 p1, bit, 0; selp.u32 size, 4, 0, p1; add.u32 a2, a1, "
        "size; "
        "and.b32 bit, %1, 4; setp.ne.u32 p2, bit, 0; selp.u32 size, 4, 0, p2; add.u32 a3, a2, "
        "size; "
        "and.b32 bit, %1, 8; setp.ne.u32 p3, bit, 0; "
        "@p0 st.shared.b32 [%0], %2; @p1 st.shared.b32 [a1], %3; "
        "@p2 st.shared.b32 [a2], %4; @p3 st.shared.b32 [a3], %5; }" ::"r"(address),
        "r"(wanted), "r"(std::bit_cast<uint32_t>(x[0])), "r"(std::bit_cast<uint32_t>(x[1])),
        "r"(std::bit_cast<uint32_t>(x[2])), "r"(std::bit_cast<uint32_t>(x[3]))
        : "memory");
  }
};

// Add x, for any number of threads at once.
__device__ __forceinline__ void add(uint32_t address, uint32_t x) {
  asm volatile("red.shared.add.u32 [%0], %1;" ::"r"(address), "r"(x) : "memory");
}

}  // namespace hisa::cuda::ptx
