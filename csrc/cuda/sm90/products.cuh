// Dot products of keys and queries, and a key's score from them, in the one order that all kernels
// of this family have.
//
// Order of the sum over heads, fixed: with c = lane % 4, a lane adds heads 2c, 2c + 8, 2c + 16, ..
// one fused multiply-add after another, and likewise 2c + 1, 2c + 9, ..; then both; then lanes
// whose c differ by 2, by 1. The key's scale comes last.
#pragma once

#include "../params.h"
#include "../ptx/shared.cuh"
#include "../ptx/wgmma.cuh"

namespace hisa::cuda::sm90 {

template <class C, int kCount>
__device__ __forceinline__ void multiply_step(float (&d)[kCount], uint64_t a, uint64_t b,
                                              bool add) {
  if constexpr (C::kType == ElementType::kFloat8E4M3)
    ptx::wgmma_e4m3(d, a, b, add);
  else
    ptx::wgmma_bf16(d, a, b, add);
}

// Begin the dot products of 64 keys with as many columns as there is room for in d. Keys and
// queries are addresses in shared memory.
template <class C, int kCount>
__device__ __forceinline__ void multiply(float (&d)[kCount], uint32_t keys, uint32_t queries) {
  ptx::pin(d);
  ptx::fence_products();
#pragma unroll
  for (int panel = 0; panel < C::kPanels; ++panel) {
    const uint64_t a = ptx::describe<C::kPitch>(keys + panel * C::kTile * C::kPitch);
    const uint64_t b = ptx::describe<C::kPitch>(queries + panel * C::kColumns * C::kPitch);
#pragma unroll
    for (int step = 0; step < C::kSteps; ++step)
      multiply_step<C>(d, a + step * 2, b + step * 2, panel + step > 0);
  }
  ptx::commit_products();
}

// Add up the four lanes of each value; they go on with half of the values each, as long as there
// are several. Lane c of four has values c * kCount / 4 on, or c * kCount / 4 rounded down.
template <int kCount, int kMask>
__device__ __forceinline__ void fold(float* values) {
  const bool high = (threadIdx.x & kMask) != 0;
  if constexpr (kCount == 1) {
    values[0] += __shfl_xor_sync(~0U, values[0], kMask);
  } else {
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) {
      const float mine = high ? values[i + kCount / 2] : values[i];
      const float other = high ? values[i] : values[i + kCount / 2];
      values[i] = mine + __shfl_xor_sync(~0U, other, kMask);
    }
  }
}

// relu() as the maximum with 0 is an instruction of half the rate, on another pipe than
// multiply-adds. One of theirs, of full rate, rounds a product to [0, 1], and takes NaN to 0 too:
// so for fp8, whose dot products are below 2^25, it makes relu() times 2^-25, and weights times
// 2^25 give the same bits, unless some weight is above kMostWeight. Both pipes together are the
// fastest: even heads are rounded, odd ones take the maximum.
inline constexpr float kUp = 0x1p25F;
inline constexpr float kMostWeight = 0x1p100F;

// Multiply those of even heads, which come first of each two.
template <int kWeights>
__device__ __forceinline__ void raise(float (&weights)[kWeights]) {
#pragma unroll
  for (int i = 0; i < kWeights; i += 2) weights[i] *= kUp;
}

// For a lane's keys g and g + 8 (as above, lane / 4) the sum over the lane's heads of each row, in
// values 2 * row and 2 * row + 1. `raised`: see raise().
template <int kHeads, int kRows, int kWeights>
__device__ __forceinline__ void weigh(const float (&weights)[kWeights],
                                      const float (&dots)[kRows * kHeads / 2],
                                      float (&sums)[2 * kRows], bool raised) {
  constexpr int kRowPairs = kHeads / 8;
  const auto relu = [](float dot) { return fmaxf(dot, 0.0F); };
  const auto weigh_by = [&](auto relu_even) {
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      float even[2] = {};
      float odd[2] = {};
#pragma unroll
      for (int i = row * kRowPairs; i < (row + 1) * kRowPairs; ++i)
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          even[k] = fmaf(weights[2 * i], relu_even(dots[4 * i + 2 * k]), even[k]);
          odd[k] = fmaf(weights[2 * i + 1], relu(dots[4 * i + 2 * k + 1]), odd[k]);
        }
#pragma unroll
      for (int k = 0; k < 2; ++k) sums[2 * row + k] = even[k] + odd[k];
    }
  };
  if (raised)
    weigh_by([](float dot) { return __saturatef(dot * (1.0F / kUp)); });
  else
    weigh_by(relu);
}

}  // namespace hisa::cuda::sm90
