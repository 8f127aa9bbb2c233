// The search for a bar by counting: how many candidates reach a key, until just enough do.
#pragma once

#include "select.cuh"

namespace hisa::cuda {

inline constexpr uint32_t kLowestKey = 0x007fffffU;  // of -inf

// Two keys with the bar between them: `low` is reached by at least `count` candidates, `high` by
// fewer.
struct Bracket {
  uint32_t low, high;
  uint32_t reach_low, reach_high;
  uint32_t steps = 0;

  // Whether `low` is the bar, or all that pass it are; up to `slack` more than count may.
  __device__ bool found(uint32_t count, uint32_t slack) const {
    return reach_low <= count + slack || high - low == 1;
  }
  // Where the bar would be if counts to the power 0.4 grew evenly in between, as they nearly do for
  // sums of many terms, at the median and far from it. Every sixth guess halves the keys instead,
  // so that it ends soon for any scores.
  __device__ uint32_t guess(uint32_t count) {
    if (++steps % 6 == 0) return low + (high - low) / 2;
    const auto grown = [](uint32_t n) { return __powf(static_cast<float>(n), 0.4F); };
    const float from = to_score(low);
    const float part =
        __fdividef(grown(reach_low) - grown(count), grown(reach_low) - grown(reach_high));
    const uint32_t key = to_key(from + (to_score(high) - from) * part);
    return min(max(key, low + 1), high - 1);
  }
  __device__ void narrow(uint32_t key, uint32_t reach, uint32_t count) {
    if (reach >= count) {
      low = key;
      reach_low = reach;
    } else {
      high = key;
      reach_high = reach;
    }
  }
};

}  // namespace hisa::cuda
