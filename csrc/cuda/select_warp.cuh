// Stage `select` for few candidates: the best `count` of up to 32 * kKeys scores, by one warp,
// which needs no barrier and no histogram. Same keys and same order as select.cuh.
#pragma once

#include "select.cuh"

namespace hisa::cuda {

// The largest key that at least `count` of n candidates reach; a lane's keys, 0 where it has none.
// The guess is where that key would be if scores lay evenly between the ends so far. Every fourth
// one halves the keys in between, so that it ends soon for any scores.
template <int kKeys>
__device__ __forceinline__ uint32_t find_bar_by_warp(const uint32_t (&keys)[kKeys], uint32_t n,
                                                     uint32_t count) {
  uint32_t low = ~0U;  // all reach it
  uint32_t high = 0;   // and none this
#pragma unroll
  for (int i = 0; i < kKeys; ++i) {
    low = min(low, keys[i] - 1);  // which is large for a 0
    high = max(high, keys[i]);
  }
  low = __reduce_min_sync(~0U, low) + 1;
  high = __reduce_max_sync(~0U, high) + 1;
  uint32_t reach_low = n;
  uint32_t reach_high = 0;
#pragma unroll 1
  for (uint32_t step = 1; reach_low != count && high - low > 1; ++step) {
    uint32_t guess = low + (high - low) / 2;
    if (step % 4 != 0) {
      const float from = to_score(low);
      const float part =
          static_cast<float>(reach_low - count) / static_cast<float>(reach_low - reach_high);
      const uint32_t key = to_key(from + (to_score(high) - from) * part);
      guess = min(max(key, low + 1), high - 1);
    }
    uint32_t reach = 0;
#pragma unroll
    for (int i = 0; i < kKeys; ++i) reach += keys[i] >= guess;
    reach = __reduce_add_sync(~0U, reach);
    if (reach >= count) {
      low = guess;
      reach_low = reach;
    } else {
      high = guess;
      reach_high = reach;
    }
  }
  return low;
}

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
  const uint32_t bar = find_bar_by_warp(keys, n, count);
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
