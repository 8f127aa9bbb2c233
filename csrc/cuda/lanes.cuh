// A vector of up to 256 channels in a warp, in pieces of 128: four adjacent channels in each lane.
// And from fp32 to the dtypes of keys and queries, and back; and launches for each of these.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../params.h"

namespace hisa::cuda {

// Call `launch` with the type of elements, and return how it went; fp8 is not one of the floats.
template <class Launch>
cudaError_t launch_for_floats(ElementType type, Launch launch) {
  switch (type) {
    case ElementType::kFloat32: launch.template operator()<float>(); break;
    case ElementType::kBFloat16: launch.template operator()<__nv_bfloat16>(); break;
    case ElementType::kFloat16: launch.template operator()<__half>(); break;
    case ElementType::kFloat8E4M3: return cudaErrorInvalidValue;
  }
  return cudaGetLastError();
}
template <class Launch>
cudaError_t launch_for_any(ElementType type, Launch launch) {
  if (type != ElementType::kFloat8E4M3) return launch_for_floats(type, launch);
  launch.template operator()<__nv_fp8_e4m3>();
  return cudaGetLastError();
}

__device__ inline float widen(float x) { return x; }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float widen(__half x) { return __half2float(x); }
__device__ inline float widen(__nv_fp8_e4m3 x) { return static_cast<float>(x); }

__device__ inline void narrow(float x, float& y) { y = x; }
__device__ inline void narrow(float x, __nv_bfloat16& y) { y = __float2bfloat16_rn(x); }
__device__ inline void narrow(float x, __half& y) { y = __float2half_rn(x); }
__device__ inline void narrow(float x, __nv_fp8_e4m3& y) {
  y.__x = __nv_cvt_float_to_fp8(x, __NV_NOSAT, __NV_E4M3);
}

inline constexpr int kLane = 4;  // adjacent channels of a lane
inline constexpr int kPiece = 32 * kLane;
inline constexpr int kMostPieces = 2;

template <class T>
struct alignas(kLane * sizeof(T)) Four {
  T at[kLane];
};
using Floats = Four<float>;

// The same as a register or a few, so that loads wait for nothing but their use.
template <class T>
using Bits =
    std::conditional_t<sizeof(T) == 1, uint32_t, std::conditional_t<sizeof(T) == 2, uint2, uint4>>;

template <class T>
__device__ Bits<T> load_bits(const T* x) {
  return *reinterpret_cast<const Bits<T>*>(x);
}

template <class T>
__device__ Floats widened(const Bits<T>& bits) {
  Four<T> x;
  static_assert(sizeof(x) == sizeof(bits));
  memcpy(&x, &bits, sizeof(x));
  Floats wide;
#pragma unroll
  for (int j = 0; j < kLane; ++j) wide.at[j] = widen(x.at[j]);
  return wide;
}

template <class T>
__device__ Four<T> narrowed(const Floats& x) {
  Four<T> y;
#pragma unroll
  for (int j = 0; j < kLane; ++j) narrow(x.at[j], y.at[j]);
  return y;
}

// The first of this lane's channels in a piece.
__device__ inline int first_channel(int piece) {
  return piece * kPiece + static_cast<int>(threadIdx.x % 32) * kLane;
}

// The largest magnitude in all lanes; NaN if there is one.
template <int kPieces>
__device__ float find_amax(const Floats (&x)[kPieces]) {
  uint32_t most = 0;  // as bits: NaN is above infinity
#pragma unroll
  for (int i = 0; i < kPieces; ++i)
#pragma unroll
    for (int j = 0; j < kLane; ++j) most = max(most, __float_as_uint(x[i].at[j]) & 0x7FFFFFFFU);
  return __uint_as_float(__reduce_max_sync(~0U, most));
}

// The larger one; NaN if there is one.
__device__ inline float larger(float a, float b) { return b > a || b != b ? b : a; }

// Of the largest magnitude in a vector of fp8; NaN if that is.
__device__ inline float scale_of(float amax) {
  constexpr float kFp8Max = 448.0F;
  constexpr float kMinScale = 1e-10F;
  const float scale = __fdiv_rn(amax, kFp8Max);
  return scale < kMinScale ? kMinScale : scale;
}

}  // namespace hisa::cuda
