// Stage `select` for few candidates: the best `count` of up to 32 * kKeys scores, by one warp,
// which needs no barrier and no histogram. Same keys and same order as select.cuh.
#pragma once

#include "select_bracket.cuh"

namespace hisa::cuda {

// The largest key that at least `count` of n candidates reach, 1 <= count < n; a lane's keys, 0
// where it has none.
template <int kKeys>
__device__ __forceinline__ uint32_t find_bar_by_warp(const uint32_t (&keys)[kKeys], uint32_t n,
                                                     uint32_t count) {
  uint32_t least = ~0U;
  uint32_t most = 0;
#pragma unroll
  for (int i = 0; i < kKeys; ++i) {
    least = min(least, keys[i] - 1);  // which is large for a 0
    most = max(most, keys[i]);
  }
  Bracket bracket{__reduce_min_sync(~0U, least) + 1, __reduce_max_sync(~0U, most) + 1, n, 0};
#pragma unroll 1
  while (!bracket.found(count, 0)) {
    const uint32_t guess = bracket.guess(count);
    uint32_t reach = 0;
#pragma unroll
    for (int i = 0; i < kKeys; ++i) reach += keys[i] >= guess;
    bracket.narrow(guess, __reduce_add_sync(~0U, reach), count);
  }
  return bracket.low;
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
