// Stage `pool`: one representative key per complete block, one block of threads for each slot.
//
//   mean   sum_i k[i] * k_scale[i] / block_size, tokens added one after the other, in fp32
//   max    the largest k[i] * k_scale[i] of each channel; NaN if there is one
//
// fp8 is quantised again with the scale max(amax / 448, 1e-10). Slot i belongs to the block that
// holds token i * block_size; if that one is incomplete, the slot is zero, and nothing reads it.
// Cost: the keys are read once.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include "../windows.h"
#include "launch.h"

namespace hisa::cuda {
namespace {

constexpr int kMaxDim = 256;  // a thread for each channel
constexpr float kFp8Max = 448.0F;
constexpr float kMinScale = 1e-10F;

__device__ float widen(float x) { return x; }
__device__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ float widen(__half x) { return __half2float(x); }
__device__ float widen(__nv_fp8_e4m3 x) { return static_cast<float>(x); }

__device__ void narrow(float x, float& y) { y = x; }
__device__ void narrow(float x, __nv_bfloat16& y) { y = __float2bfloat16_rn(x); }
__device__ void narrow(float x, __half& y) { y = __float2half_rn(x); }
__device__ void narrow(float x, __nv_fp8_e4m3& y) {
  y.__x = __nv_cvt_float_to_fp8(x, __NV_NOSAT, __NV_E4M3);
}

// The larger one; NaN if there is one.
__device__ float larger(float a, float b) { return b > a || b != b ? b : a; }

// max(amax / 448, 1e-10) over the channels of all threads, NaN if there is one.
__device__ float fp8_scale(float channel) {
  __shared__ float partial[kMaxDim / 32];
  float amax = fabsf(channel);
  for (int step = 16; step > 0; step /= 2) amax = larger(amax, __shfl_xor_sync(~0U, amax, step));
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = amax;
  __syncthreads();
  for (int i = 0; i < static_cast<int>(blockDim.x / 32); ++i) amax = larger(amax, partial[i]);
  const float scale = __fdiv_rn(amax, kFp8Max);
  return scale < kMinScale ? kMinScale : scale;
}

template <class T>
__global__ __launch_bounds__(kMaxDim) void pool_kernel(const __grid_constant__ PoolParams params) {
  const Keys& keys = params.keys;
  const int64_t slot = blockIdx.x;
  const int64_t token = slot * params.block_size;
  const Segment segment = find_segment(params.windows, token, keys.count);
  const int64_t start =
      segment.begin + (token - segment.begin) / params.block_size * params.block_size;
  const bool complete = segment.begin < segment.end && start + params.block_size <= segment.end;

  const int64_t d = threadIdx.x;  // channels behind the last one count as zero
  float channel = 0;
  if (complete && d < keys.dim) {
    const T* key = static_cast<const T*>(keys.data) + start * keys.stride + d;
    const auto load = [&](int64_t i) {
      const float scale = keys.scale == nullptr ? 1.0F : keys.scale[start + i];
      return __fmul_rn(widen(key[i * keys.stride]), scale);
    };
    const bool mean = params.pooling == Pooling::kMean;
    channel = mean ? 0.0F : load(0);
#pragma unroll 32  // loads on their way
    for (int64_t i = 0; i < params.block_size; ++i)
      channel = mean ? __fadd_rn(channel, load(i)) : larger(channel, load(i));
    if (mean) channel = __fdiv_rn(channel, static_cast<float>(params.block_size));
  }
  float scale = 1;
  if constexpr (sizeof(T) == 1) {
    if (complete) {
      scale = fp8_scale(channel);
      channel = __fdiv_rn(channel, scale);
    }
  }
  if (d < keys.dim) narrow(channel, static_cast<T*>(params.pooled)[slot * keys.dim + d]);
  if (d == 0) params.pooled_scale[slot] = scale;
}

template <class T>
void launch(const PoolParams& params, cudaStream_t stream) {
  const auto threads = static_cast<unsigned>((params.keys.dim + 31) / 32 * 32);
  pool_kernel<T><<<static_cast<unsigned>(params.slots), threads, 0, stream>>>(params);
}

}  // namespace

cudaError_t launch_pool(const PoolParams& params, cudaStream_t stream) {
  if (params.slots == 0) return cudaSuccess;
  switch (params.keys.type) {
    case ElementType::kFloat32: launch<float>(params, stream); break;
    case ElementType::kBFloat16: launch<__nv_bfloat16>(params, stream); break;
    case ElementType::kFloat16: launch<__half>(params, stream); break;
    case ElementType::kFloat8E4M3: launch<__nv_fp8_e4m3>(params, stream); break;
  }
  return cudaGetLastError();
}

}  // namespace hisa::cuda
