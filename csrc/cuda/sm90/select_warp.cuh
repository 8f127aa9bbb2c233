// Stage `select` for few candidates: the best `count` of up to 32 * kScores, by one warp, which
// needs no barrier.
#pragma once

#include "search.cuh"

namespace hisa::cuda::sm90 {

// The bar that exactly the best `count` of n candidates pass, 1 <= count < n. A lane has
// candidates i * 32 + lane; NaN behind the last.
template <int kScores>
__device__ __forceinline__ Bar find_bar_by_warp(const float (&scores)[kScores], uint32_t n,
                                                uint32_t count) {
  float sum = 0.0F;
  float squares = 0.0F;
#pragma unroll
  for (uint32_t i = 0; i < kScores; ++i)
    if (i < n / 32) sum += scores[i], squares = fmaf(scores[i], scores[i], squares);
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) {
    sum += __shfl_xor_sync(~0U, sum, mask);
    squares += __shfl_xor_sync(~0U, squares, mask);
  }
  Search search(n, count, 0, make_spread(sum, squares, n / 32 * 32));
#pragma unroll 1
  while (!search.found()) {
    const uint32_t key = search.guess();
    const float bar = pass_from(key).score;
    float above = 0.0F;  // takes an instruction less than an integer
#pragma unroll
    for (int i = 0; i < kScores; ++i) above += scores[i] > bar ? 1.0F : 0.0F;
    search.narrow(key, __reduce_add_sync(~0U, static_cast<uint32_t>(above)));
  }
  return search.bar();
}

// Write the best of a stage of adjacent keys, of which 1 <= count < source.size; not their scores.
// All lanes of the warp call it.
template <int kScores>
__device__ __forceinline__ void write_best_by_warp(const Stage& stage, const float* from) {
  const uint32_t lane = threadIdx.x % 32;
  const uint32_t n = stage.source.size;
  float scores[kScores];
#pragma unroll
  for (int i = 0; i < kScores; ++i) {
    const uint32_t at = i * 32 + lane;
    scores[i] = at < n ? from[at] : NAN;
  }
  const Bar bar = find_bar_by_warp(scores, n, stage.count);
  // What candidate 0 stands for, and the next ones: not looked up one by one.
  const int32_t value = stage.source.value(0);
  const int shift = stage.source.value_shift;
  int32_t* values = stage.values;
  const uint32_t before = (1U << lane) - 1;
  uint32_t slot = 0;
  uint32_t ties = bar.ties;  // that still pass
#pragma unroll
  for (int i = 0; i < kScores; ++i) {
    const uint32_t at = i * 32 + lane;
    bool passes = bar.below(scores[i]);
    if (bar.ties > 0) {
      const bool equal = at < n && bar.equals(scores[i]);
      const uint32_t all = __ballot_sync(~0U, equal);
      passes = passes || (equal && static_cast<uint32_t>(__popc(all & before)) < ties);
      ties -= min(ties, static_cast<uint32_t>(__popc(all)));
    }
    const uint32_t passing = __ballot_sync(~0U, passes);
    if (passes)
      values[slot + static_cast<uint32_t>(__popc(passing & before))] =
          value + static_cast<int32_t>(at << shift);
    slot += static_cast<uint32_t>(__popc(passing));
  }
}

}  // namespace hisa::cuda::sm90
