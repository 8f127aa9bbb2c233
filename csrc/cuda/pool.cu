// Stage `pool`: one representative key per complete block, a warp for each slot.
//
//   mean   sum_i k[i] * k_scale[i] / block_size, tokens added one after the other, in fp32
//   max    the largest k[i] * k_scale[i] of each channel; NaN if there is one
//
// fp8 is quantised again with the scale max(amax / 448, 1e-10). Slot i belongs to the block that
// holds token i * block_size; if that one is incomplete, the slot is zero, and nothing reads it.
// Cost: the keys are read once, a few KB of each warp on their way.
#include "../windows.h"
#include "lanes.cuh"
#include "launch.h"

namespace hisa::cuda {
namespace {

constexpr int kWarps = 4;        // of a block of threads
constexpr int kInFlight = 4096;  // bytes of a warp

// Of the tokens from `start` on, for the four channels from `key` on.
template <class T, bool kMean>
__device__ Floats pool_channels(const PoolParams& params, int64_t start, const T* key) {
  constexpr int kTokens = kInFlight / (kPiece * sizeof(T));  // a lane has the scale of each
  static_assert(kTokens <= 32);
  const int64_t stride = params.keys.stride;
  const auto tokens = static_cast<int>(params.block_size);
  const int lane = static_cast<int>(threadIdx.x % 32);
  Floats pooled{};
#pragma unroll 1
  for (int first = 0; first < tokens; first += kTokens) {
    Bits<T> x[kTokens];
#pragma unroll
    for (int i = 0; i < kTokens; ++i) x[i] = load_bits(key + min(first + i, tokens - 1) * stride);
    float scales = 1.0F;
    if (params.keys.scale != nullptr)
      scales = params.keys.scale[start + min(first + lane, tokens - 1)];
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      const Floats wide = widened<T>(x[i]);
      const float scale = __shfl_sync(~0U, scales, i);
      const bool inside = first + i < tokens;
#pragma unroll
      for (int j = 0; j < kLane; ++j) {
        const float value = __fmul_rn(wide.at[j], scale);
        const float sum = pooled.at[j];
        const float next = kMean            ? __fadd_rn(sum, value)
                           : first + i == 0 ? value
                                            : larger(sum, value);
        pooled.at[j] = inside ? next : sum;
      }
    }
  }
  if constexpr (kMean)
#pragma unroll
    for (float& sum : pooled.at) sum = __fdiv_rn(sum, static_cast<float>(tokens));
  return pooled;
}

template <class T, bool kMean>
__global__ __launch_bounds__(kWarps *
                             32) void pool_kernel(const __grid_constant__ PoolParams params) {
  const Keys& keys = params.keys;
  const int64_t slot = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  if (slot >= params.slots) return;
  const int64_t token = slot * params.block_size;
  const Segment segment = find_segment(params.windows, token, keys.count);
  const int64_t start =
      segment.begin + (token - segment.begin) / params.block_size * params.block_size;
  const bool complete = segment.begin < segment.end && start + params.block_size <= segment.end;

  Floats pooled[kMostPieces] = {};
#pragma unroll
  for (int i = 0; i < kMostPieces; ++i)
    if (complete && i * kPiece < keys.dim) {
      // A lane without channels reads those of the first one.
      const int channel = first_channel(i) < keys.dim ? first_channel(i) : 0;
      const T* const key = static_cast<const T*>(keys.data) + start * keys.stride + channel;
      const Floats sums = pool_channels<T, kMean>(params, start, key);
      if (first_channel(i) < keys.dim) pooled[i] = sums;
    }
  float scale = 1.0F;
  if constexpr (sizeof(T) == 1) {
    if (complete) {
      scale = scale_of(find_amax(pooled));
      for (Floats& piece : pooled)
        for (float& channel : piece.at) channel = __fdiv_rn(channel, scale);
    }
  }
#pragma unroll
  for (int i = 0; i < kMostPieces; ++i)
    if (first_channel(i) < keys.dim)
      *reinterpret_cast<Four<T>*>(static_cast<T*>(params.pooled) + slot * keys.dim +
                                  first_channel(i)) = narrowed<T>(pooled[i]);
  if (threadIdx.x % 32 == 0) params.pooled_scale[slot] = scale;
}

template <class T>
void launch(const PoolParams& params, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>((params.slots + kWarps - 1) / kWarps);
  if (params.pooling == Pooling::kMean)
    pool_kernel<T, true><<<blocks, kWarps * 32, 0, stream>>>(params);
  else
    pool_kernel<T, false><<<blocks, kWarps * 32, 0, stream>>>(params);
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
