// Stage `select` for few candidates: the best `count` of up to 32 * kKeys scores, by one warp,
// which needs no barrier and no histogram. Same keys and same order as select.cuh.
#pragma once

#include "select.cuh"

namespace hisa::cuda {

// Write the best of a stage, of which 1 <= count < source.size; not their scores. All lanes of the
// warp call it.
template <int kKeys>
__device__ __forceinline__ void write_best_by_warp(const Stage& stage, const float* scores) {
  const uint32_t lane = threadIdx.x % 32;
  const uint32_t n = stage.source.size;
  const uint32_t count = stage.count;
  uint32_t keys[kKeys];
#pragma unroll
  for (int i = 0; i < kKeys; ++i) {
    const uint32_t at = i * 32 + lane;
    keys[i] = at < n ? to_key(scores[at]) : 0;
  }
  // The largest key that at least `count` candidates reach, bit by bit.
  uint32_t bar = 0;
#pragma unroll 1
  for (uint32_t bit = 1U << 31; bit > 0; bit >>= 1) {
    uint32_t reach = 0;
#pragma unroll
    for (int i = 0; i < kKeys; ++i) reach += keys[i] >= (bar | bit);
    reach = __reduce_add_sync(~0U, reach);
    if (reach >= count) bar |= bit;
    if (reach == count) break;
  }
  uint32_t above = 0;
#pragma unroll
  for (int i = 0; i < kKeys; ++i) above += keys[i] > bar;
  uint32_t ties = count - __reduce_add_sync(~0U, above);  // of those that equal the bar

  const uint32_t before = (1U << lane) - 1;
  uint32_t slot = 0;
#pragma unroll
  for (int i = 0; i < kKeys; ++i) {
    const uint32_t equal = __ballot_sync(~0U, keys[i] == bar);
    const bool tie = keys[i] == bar && static_cast<uint32_t>(__popc(equal & before)) < ties;
    const bool passes = keys[i] > bar || tie;
    const uint32_t passing = __ballot_sync(~0U, passes);
    if (passes)
      stage.values[slot + static_cast<uint32_t>(__popc(passing & before))] =
          stage.source.value(i * 32 + lane);
    slot += static_cast<uint32_t>(__popc(passing));
    ties -= min(ties, static_cast<uint32_t>(__popc(equal)));
  }
}

}  // namespace hisa::cuda
