// The bar of a selection, found in fewer steps than by the digits of keys: the range of the scores
// is cut into as many equal parts as there are bins, so that the part with the bar holds few.
#pragma once

#include "../select.cuh"

namespace hisa::cuda::sm90 {

// The smallest and the largest of a thread's values, over all threads. It ends with a barrier.
template <class Team>
__device__ __forceinline__ void reduce_range(SharedMemory& memory, float& low, float& high) {
  const uint32_t smallest = __reduce_min_sync(~0U, to_key(low));
  const uint32_t largest = __reduce_max_sync(~0U, to_key(high));
  const uint32_t thread = Team::thread();
  if (thread % 32 == 0) {
    memory.sums[0][thread / 32] = smallest;
    memory.sums[1][thread / 32] = largest;
  }
  Team::sync();
  uint32_t ends[2] = {memory.sums[0][0], memory.sums[1][0]};
#pragma unroll
  for (int w = 1; w < kWarps; ++w) {
    ends[0] = min(ends[0], memory.sums[0][w]);
    ends[1] = max(ends[1], memory.sums[1][w]);
  }
  low = to_score(ends[0]);
  high = to_score(ends[1]);
  Team::sync();
}

// The bar that exactly the best `count` of scores [n] pass; 1 <= count < n. The histogram is zero,
// before and after. All threads call it, after a barrier; one has to follow.
template <class Team>
__device__ __forceinline__ Bar find_bar_by_range(SharedMemory& memory, const float* scores,
                                                 uint32_t n, uint32_t count) {
  float low = INFINITY;  // NaN changes neither
  float high = -INFINITY;
  for_each<Team>(scores, n, [&](float score) {
    low = fminf(low, score);
    high = fmaxf(high, score);
  });
  reduce_range<Team>(memory, low, high);
  const float scale = (kHistogram - 1) / (high - low);
  if (!(scale > 0.0F && scale < INFINITY))  // all alike, or one is infinite
    return find_bar_by_digits<Team>(memory, scores, n, count, 0);

  // Grows with the score; NaN, like the lowest score, is in the first bin.
  const auto bin_of = [&](float score) {
    return min(__float2uint_rz((score - low) * scale), kHistogram - 1U);
  };
  uint32_t* bins = histogram(memory);
  const uint32_t address = ptx::shared_address(bins);
  for_each<Team>(scores, n, [&](float score) { ptx::add(address + bin_of(score) * 4, 1); });
  Team::sync();
  find_bin<Team>(memory, count);
  const auto found = memory.found;
  if (found.count > kThreads) return find_bar_by_digits<Team>(memory, scores, n, count, 0);

  // The keys in that bin, in any order, in place of the histogram.
  if (Team::thread() == 0) memory.sums[0][0] = 0;
  Team::sync();
  for_each<Team>(scores, n, [&](float score) {
    if (bin_of(score) == found.bin) bins[atomicAdd(&memory.sums[0][0], 1U)] = to_key(score);
  });
  Team::sync();
  const uint32_t need = count - found.before;
  const bool mine = Team::thread() < found.count;
  const uint32_t key = mine ? bins[Team::thread()] : 0;
  uint32_t greater = 0;
  uint32_t equal = 0;
  for (uint32_t i = 0; i < found.count; ++i) {
    greater += bins[i] > key;
    equal += bins[i] == key;
  }
  if (mine && greater < need && need <= greater + equal) {
    const bool all = need == greater + equal && key > kLowestKey;
    memory.sums[1][0] = key;
    memory.sums[1][1] = all ? 0 : need - greater;
  }
  Team::sync();
  if (mine) bins[Team::thread()] = 0;
  const uint32_t ties = memory.sums[1][1];
  return ties == 0 ? pass_from(memory.sums[1][0]) : Bar{to_score(memory.sums[1][0]), ties};
}

}  // namespace hisa::cuda::sm90
