// What the kernels use of CUDA, on a CPU: see scheduler.h.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "../scheduler.h"

#define __device__
#define __host__
#define __global__
#define __shared__
#define __grid_constant__
#define __align__(n)
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __CUDA_ARCH_FEAT_SM90_ALL

struct ThreadIndex {
  struct {
    operator uint32_t() const {
      return simt::Block::current().thread().index % simt::Block::current().size();
    }
  } x;
};
struct BlockIndex {
  struct {
    operator uint32_t() const {
      return simt::Block::current().block + simt::Block::current().rank();
    }
  } x;
};
struct GridSize {
  struct {
    operator uint32_t() const { return simt::Block::current().grid; }
  } x;
};
inline constexpr ThreadIndex threadIdx{};
inline constexpr BlockIndex blockIdx{};
inline constexpr GridSize gridDim{};

struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(16) int4 {
  int32_t x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

template <class A, class B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  using T = std::common_type_t<A, B>;
  return static_cast<T>(a) < static_cast<T>(b) ? static_cast<T>(a) : static_cast<T>(b);
}
template <class A, class B>
constexpr std::common_type_t<A, B> max(A a, B b) {
  using T = std::common_type_t<A, B>;
  return static_cast<T>(a) > static_cast<T>(b) ? static_cast<T>(a) : static_cast<T>(b);
}

inline float __uint_as_float(uint32_t x) { return std::bit_cast<float>(x); }
inline float __int_as_float(int32_t x) { return std::bit_cast<float>(x); }
inline uint32_t __float_as_uint(float x) { return std::bit_cast<uint32_t>(x); }
template <class T>
T __ldg(const T* x) {
  return *x;
}
inline int __clz(int x) { return std::countl_zero(static_cast<uint32_t>(x)); }
inline int __popc(uint32_t x) { return std::popcount(x); }
inline uint32_t __dp4a(uint32_t a, uint32_t b, uint32_t c) {
  for (int i = 0; i < 32; i += 8) c += (a >> i & 255U) * (b >> i & 255U);
  return c;
}
inline uint32_t __float2uint_rz(float x) {
  return !(x > 0) ? 0 : x >= 4294967296.0F ? ~0U : static_cast<uint32_t>(x);
}
inline uint32_t atomicAdd(uint32_t* to, uint32_t x) {
  const uint32_t before = *to;
  *to += x;
  return before;
}

template <class T>
uint64_t to_bits(T x) {
  uint64_t bits = 0;
  std::memcpy(&bits, &x, sizeof x);
  return bits;
}
template <class T>
T from_bits(uint64_t bits) {
  T x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
template <class T, class From>
T exchange(T x, From from) {  // every lane gets the value of lane from(lane)
  return from_bits<T>(
      simt::Block::current().meet(to_bits(x), [&](const uint64_t* in, uint64_t* out) {
        for (uint32_t i = 0; i < 32; ++i) out[i] = in[from(i)];
      }));
}
inline uint32_t lane_of_thread() { return threadIdx.x % 32; }
template <class T>
T __shfl_sync(uint32_t, T x, uint32_t source, uint32_t width = 32) {
  return exchange(x, [=](uint32_t i) { return i / width * width + source % width; });
}
template <class T>
T __shfl_up_sync(uint32_t, T x, uint32_t step) {
  return exchange(x, [step](uint32_t i) { return i >= step ? i - step : i; });
}
template <class T>
T __shfl_xor_sync(uint32_t, T x, uint32_t mask) {
  return exchange(x, [mask](uint32_t i) { return i ^ mask; });
}
template <class Combine>
uint32_t reduce(uint32_t x, Combine combine) {
  return static_cast<uint32_t>(
      simt::Block::current().meet(x, [&](const uint64_t* in, uint64_t* out) {
        uint32_t all = static_cast<uint32_t>(in[0]);
        for (int i = 1; i < 32; ++i) all = combine(all, static_cast<uint32_t>(in[i]));
        for (int i = 0; i < 32; ++i) out[i] = all;
      }));
}
inline int __ffs(int x) { return x == 0 ? 0 : std::countr_zero(static_cast<uint32_t>(x)) + 1; }
inline float __logf(float x) { return std::log(x); }
inline float __saturatef(float x) { return x > 0 ? std::fmin(x, 1.0F) : 0.0F; }
inline float __powf(float a, float b) { return std::pow(a, b); }
inline float __fdividef(float a, float b) { return a / b; }
inline uint32_t __reduce_add_sync(uint32_t, uint32_t x) {
  return reduce(x, [](uint32_t a, uint32_t b) { return a + b; });
}
inline uint32_t __reduce_min_sync(uint32_t, uint32_t x) {
  return reduce(x, [](uint32_t a, uint32_t b) { return std::min(a, b); });
}
inline uint32_t __reduce_max_sync(uint32_t, uint32_t x) {
  return reduce(x, [](uint32_t a, uint32_t b) { return std::max(a, b); });
}
inline uint32_t __ballot_sync(uint32_t, bool x) {
  return static_cast<uint32_t>(
      simt::Block::current().meet(x, [](const uint64_t* in, uint64_t* out) {
        uint64_t all = 0;
        for (int i = 0; i < 32; ++i) all |= in[i] << i;
        for (int i = 0; i < 32; ++i) out[i] = all;
      }));
}
inline bool __any_sync(uint32_t, bool x) { return __ballot_sync(0, x) != 0; }
inline void __syncwarp() {
  simt::Block::current().meet(0, [](const uint64_t*, uint64_t*) {});
}
inline void __syncthreads() {
  auto& block = simt::Block::current();
  block.sync(0, block.size());
}

// The driver's part.
using CUresult = int;
inline constexpr CUresult CUDA_SUCCESS = 0;
using cuuint64_t = uint64_t;
using cuuint32_t = uint32_t;
enum CUtensorMapDataType {
  CU_TENSOR_MAP_DATA_TYPE_UINT8,
  CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
  CU_TENSOR_MAP_DATA_TYPE_FLOAT32
};
enum CUtensorMapInterleave { CU_TENSOR_MAP_INTERLEAVE_NONE };
enum CUtensorMapSwizzle {
  CU_TENSOR_MAP_SWIZZLE_NONE,
  CU_TENSOR_MAP_SWIZZLE_64B,
  CU_TENSOR_MAP_SWIZZLE_128B
};
enum CUtensorMapL2promotion { CU_TENSOR_MAP_L2_PROMOTION_L2_256B };
enum CUtensorMapFloatOOBfill { CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE };
struct alignas(64) CUtensorMap {
  const char* data;
  uint32_t rank;
  int64_t element;
  int64_t size[3];
  int64_t stride[3];  // bytes
  int64_t box[3];
};
