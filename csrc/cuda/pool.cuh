// A block of keys pooled to one key by a warp; and the sum of a channel, for paged_pool.cu as well,
// so that both give the same bits.
//
//   mean   sum_i k[i] * k_scale[i] / count, tokens added one after the other, in fp32
//   max    the largest k[i] * k_scale[i] of each channel; NaN if there is one
//
// fp8 is quantised again with the scale max(amax / 448, 1e-10). Cost: the keys are read once, a few
// KB of each warp on their way.
#pragma once

#include <limits>

#include "lanes.cuh"

namespace hisa::cuda {

inline constexpr int kPoolWarps = 4;  // of a block of threads
inline constexpr int kInFlight = 4096;  // bytes of a warp

// Where a token's key and its scale lie; null: the scale is 1.
struct TokenAt {
  const void* key;
  const float* scale;
};

// Of one channel: before its first token, and with one token more.
template <bool kMean>
inline constexpr float kNothingPooled = kMean ? 0.0F : -std::numeric_limits<float>::infinity();

template <bool kMean>
__device__ __forceinline__ float pool_value(float pooled, float key, float scale) {
  const float value = __fmul_rn(key, scale);
  return kMean ? __fadd_rn(pooled, value) : larger(pooled, value);
}

// The four channels from `channel` on of tokens 0 to `count`. find(i) says where token i lies.
template <class T, bool kMean, class Find>
__device__ __forceinline__ Floats pool_channels(int count, int channel, Find find) {
  constexpr int kTokens = kInFlight / (kPiece * sizeof(T));  // a lane has the scale of each
  static_assert(kTokens <= 32);
  const int lane = static_cast<int>(threadIdx.x % 32);
  constexpr float kNone = kNothingPooled<kMean>;
  Floats pooled{kNone, kNone, kNone, kNone};
#pragma unroll 1
  for (int first = 0; first < count; first += kTokens) {
    Bits<T> x[kTokens];
#pragma unroll
    for (int i = 0; i < kTokens; ++i)
      x[i] = load_bits(static_cast<const T*>(find(min(first + i, count - 1)).key) + channel);
    const float* const scale_at = find(min(first + lane, count - 1)).scale;
    const float scales = scale_at == nullptr ? 1.0F : *scale_at;
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      const Floats wide = widened<T>(x[i]);
      const float scale = __shfl_sync(~0U, scales, i);
      const bool inside = first + i < count;
#pragma unroll
      for (int j = 0; j < kLane; ++j) {
        const float before = pooled.at[j];
        const float after = pool_value<kMean>(before, wide.at[j], scale);
        pooled.at[j] = inside ? after : before;
      }
    }
  }
  if constexpr (kMean)
#pragma unroll
    for (float& sum : pooled.at) sum = __fdiv_rn(sum, static_cast<float>(count));
  return pooled;
}

// Write the pooled key of `count` tokens, and its scale; without tokens, zeros.
template <class T, bool kMean, class Find>
__device__ __forceinline__ void pool_block(int count, int dim, T* pooled_k, float* pooled_scale,
                                           Find find) {
  Floats pooled[kMostPieces] = {};
#pragma unroll
  for (int i = 0; i < kMostPieces; ++i)
    if (count > 0 && i * kPiece < dim) {
      // A lane without channels reads those of the first one.
      const bool inside = first_channel(i) < dim;
      const Floats found = pool_channels<T, kMean>(count, inside ? first_channel(i) : 0, find);
      if (inside) pooled[i] = found;
    }
  float scale = 1.0F;
  if constexpr (sizeof(T) == 1) {
    if (count > 0) {
      scale = scale_of(find_amax(pooled));
      for (Floats& piece : pooled)
        for (float& channel : piece.at) channel = __fdiv_rn(channel, scale);
    }
  }
#pragma unroll
  for (int i = 0; i < kMostPieces; ++i)
    if (first_channel(i) < dim)
      *reinterpret_cast<Four<T>*>(pooled_k + first_channel(i)) = narrowed<T>(pooled[i]);
  if (threadIdx.x % 32 == 0) *pooled_scale = scale;
}

}  // namespace hisa::cuda
