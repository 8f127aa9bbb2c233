// What a block of threads selects among scores in its shared memory. It is done once or twice a
// launch, so it takes as long as its barriers take, and its instructions to come; both are few:
//
//   count    scores by equal steps of their range: the bin of the last one that is selected
//   sort out what is in higher bins; what is in that one
//   rank     the scores of that bin, one by one                               -> the bar
//   write    the positions of those that pass it
//
// Where that bin is crowded, the bar is found by counting how many pass others: see Search.
#pragma once

#include "search.cuh"
#include "split_memory.cuh"

namespace hisa::cuda::sm90 {

// Clear what scores are counted in: kSplitBins words, with room for kMostRanked behind them. All
// threads call it, before the barrier in front of the selection.
__device__ __forceinline__ void begin_selection(SplitShared& shared, uint32_t* space) {
  reinterpret_cast<uint4*>(space)[threadIdx.x] = {0, 0, 0, 0};
  if (threadIdx.x == 0) shared.ranked = 0;
}

// Of scores [n], those from `skipped` on, of a known range. All threads call it all, after a
// barrier.
class SplitSelector {
 public:
  // begin_selection() was called for `space`. What else there is in quads of candidates is NaN.
  __device__ SplitSelector(SplitShared& shared, const float* scores, ScoreRange range,
                           uint32_t skipped, uint32_t n, uint32_t* space)
      : shared_(shared),
        scores_(scores),
        low_(to_score(range.low)),
        high_(to_score(range.high)),
        skipped_(skipped),
        n_(n),
        quads_((n + 3) / 4),
        each_((quads_ + kSplitThreads - 1) / kSplitThreads),
        first_(threadIdx.x * each_ * 4),
        space_(space) {
    static_assert(kMostScores <= kSplitThreads * 32, "a bit for each of a thread");
  }

  // Write the positions of the best `count`, 1 <= count <= n - skipped, ascending, counted from
  // `skipped` on; to `space`. There is no barrier at the end.
  __device__ __forceinline__ void select(uint32_t count) const {
    Bits bits{.unsure = bits_before(n_) & ~bits_before(skipped_)};
    const Bar bar = count < n_ - skipped_ ? find_bar(count, bits) : Bar{};
    uint32_t equal = 0;
    for (; bits.unsure != 0; bits.unsure &= bits.unsure - 1) {
      const uint32_t bit = bits.unsure & -bits.unsure;
      const float score = scores_[first_ + number_of(bit)];
      if (bar.below(score)) bits.passing |= bit;
      if (bar.ties > 0 && bar.equals(score)) equal |= bit;
    }
    // Both counts in one word.
    const uint32_t counts = sum_before(static_cast<uint32_t>(__popc(bits.passing)) |
                                       static_cast<uint32_t>(__popc(equal)) << 16);
    const uint32_t ties_before = min(counts >> 16, bar.ties);
    for (uint32_t left = bar.ties - ties_before; left > 0 && equal != 0; --left) {
      bits.passing |= equal & -equal;
      equal &= equal - 1;
    }
    uint32_t* chosen = space_ + (counts & 0xffffU) + ties_before;
    for (uint32_t left = bits.passing; left != 0; left &= left - 1)
      *chosen++ = first_ + number_of(left & -left) - skipped_;
  }

 private:
  // Of a thread's adjacent scores, from first_ on.
  struct Bits {
    uint32_t passing = 0;
    uint32_t unsure;
  };
  __device__ static uint32_t number_of(uint32_t bit) {
    return static_cast<uint32_t>(31 - __clz(static_cast<int>(bit)));
  }
  __device__ uint32_t bits_before(uint32_t end) const {
    const uint32_t number = end > first_ ? end - first_ : 0;
    const uint32_t own = min(number, each_ * 4);
    return own >= 32 ? ~0U : (1U << own) - 1;
  }

  __device__ __forceinline__ void load(uint32_t quad, float (&score)[4]) const {
    const float4 four =
        quad < quads_ ? reinterpret_cast<const float4*>(scores_)[quad] : float4{NAN, NAN, NAN, NAN};
    score[0] = four.x, score[1] = four.y, score[2] = four.z, score[3] = four.w;
  }
  // use(score) for all candidates, and what else there is, which is NaN.
  template <class Use>
  __device__ __forceinline__ void for_each(Use use) const {
#pragma unroll 2
    for (uint32_t quad = threadIdx.x; quad < quads_; quad += kSplitThreads) {
      float score[4];
      load(quad, score);
#pragma unroll
      for (const float of : score) use(of);
    }
  }

  // The sum over all threads before this one, with a barrier.
  __device__ __forceinline__ uint32_t sum_before(uint32_t mine) const {
    const uint32_t lane = threadIdx.x % 32;
    const uint32_t warp = threadIdx.x / 32;
    const LaneCounts lanes(mine, lane);
    if (lane == 0) shared_.sums[warp] = lanes.total;
    __syncthreads();
    return lanes.before + __reduce_add_sync(~0U, lane < warp ? shared_.sums[lane] : 0);
  }

  // The bar that exactly the best `count` pass, 1 <= count < n - skipped, and what this thread
  // knows by then.
  __device__ __forceinline__ Bar find_bar(uint32_t count, Bits& bits) const {
    if (rank_in_bin(count, bits)) return {shared_.bar, shared_.ties};
    return search(count);
  }

  // Likewise, to shared memory; false if the scores are not spread over the bins.
  __device__ __forceinline__ bool rank_in_bin(uint32_t count, Bits& bits) const {
    uint32_t* bins = space_;
    auto* ranked = reinterpret_cast<float*>(space_ + kSplitBins);
    const float share = __fdividef(1.0F, high_ - low_);
    if (!(share > 0.0F && share < INFINITY)) return false;
    // From the highest bin on. What is NaN is in the lowest one.
    const auto find_bin = [&](float score) {
      constexpr float kLast = kSplitBins - 1;
      const float at = __saturatef((score - low_) * share);
      return __float_as_uint(fmaf(at, -kLast, 0x1p23F + kLast)) - __float_as_uint(0x1p23F);
    };
    for_each([&](float score) { atomicAdd(bins + find_bin(score), 1U); });
    __syncthreads();

    const uint4 four = reinterpret_cast<const uint4*>(bins)[threadIdx.x];
    uint32_t before = sum_before(four.x + four.y + four.z + four.w);
    uint32_t bin = threadIdx.x * 4;
    for (const uint32_t size : {four.x, four.y, four.z, four.w}) {
      if (before < count && count <= before + size)
        shared_.bin = bin, shared_.need = count - before, shared_.size = size;
      before += size;
      ++bin;
    }
    __syncthreads();
    if (shared_.size > kMostRanked) return false;

    bin = shared_.bin;
    uint32_t unsure = 0;
    // A thread begins with another quad than its neighbour, which has others in the same bank.
    uint32_t quad = threadIdx.x % each_;
#pragma unroll 2
    for (uint32_t i = 0; i < each_; ++i) {
      float score[4];
      load(first_ / 4 + quad, score);
      uint32_t four_passing = 0;
      uint32_t four_unsure = 0;
#pragma unroll
      for (uint32_t j = 0; j < 4; ++j) {
        const uint32_t of = find_bin(score[j]);
        four_passing |= of < bin ? 1U << j : 0;
        four_unsure |= of == bin ? 1U << j : 0;
      }
      bits.passing |= four_passing << quad * 4;
      unsure |= four_unsure << quad * 4;
      quad = quad + 1 == each_ ? 0 : quad + 1;
    }
    bits.unsure &= unsure;
    for (uint32_t left = bits.unsure; left != 0; left &= left - 1) {
      const float score = scores_[first_ + number_of(left & -left)];
      if (score == score) ranked[atomicAdd(&shared_.ranked, 1U)] = score;
    }
    __syncthreads();
    const uint32_t size = shared_.ranked;
    const uint32_t need = shared_.need;
    if (need > size) return false;
    if (threadIdx.x < size) {
      const float mine = ranked[threadIdx.x];
      uint32_t above = 0;
      uint32_t equal = 0;
#pragma unroll 4
      for (uint32_t i = 0; i < size; ++i) {
        above += ranked[i] > mine;
        equal += ranked[i] == mine;
      }
      if (above < need && need <= above + equal)  // as it is for all that equal it
        shared_.bar = mine, shared_.ties = need - above;
    }
    __syncthreads();
    return true;
  }

  // The bar, whatever the scores are.
  __device__ __forceinline__ Bar search(uint32_t count) const {
    const uint32_t lane = threadIdx.x % 32;
    Search search(n_ - skipped_, count, 0, {(low_ + high_) / 2, (high_ - low_) / 8, false});
#pragma unroll 1
    for (uint32_t turn = 0; !search.found(); turn ^= 1) {
      const uint32_t key = search.guess();
      const float bar = pass_from(key).score;
      uint32_t above = 0;
      for_each([&](float score) { above += score > bar; });
      above = __reduce_add_sync(~0U, above);
      if (lane == 0) shared_.counts[turn][threadIdx.x / 32] = above;
      __syncthreads();
      above = lane < kSplitWarps ? shared_.counts[turn][lane] : 0;
      search.narrow(key, __reduce_add_sync(~0U, above));
    }
    return search.bar();
  }

  SplitShared& shared_;
  const float* scores_;
  const float low_, high_;
  const uint32_t skipped_, n_, quads_, each_;  // quads of all, of a thread
  const uint32_t first_;                       // position of this thread
  uint32_t* space_;
};

}  // namespace hisa::cuda::sm90
