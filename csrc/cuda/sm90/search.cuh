// The search for a bar by counting: how many candidates reach a key, until just enough do. Any
// guesses end at the same bar; good ones are few.
#pragma once

#include "../select.cuh"

namespace hisa::cuda::sm90 {

inline constexpr uint32_t kLowestKey = 0x007fffffU;  // of -inf, and of NaN
inline constexpr uint32_t kHighestKey = 0xff800000U;  // of inf

// What a search begins with: for all scores of a row the mean and the standard deviation of some
// of them; for a tail, the bar that they passed and how far the mean lies above it.
struct Spread {
  float at;
  float width;
  bool tail;
};
__device__ __forceinline__ Spread make_spread(float sum, float squares, uint32_t number,
                                              float bar = NAN) {
  const float share = number > 0 ? __fdividef(1.0F, static_cast<float>(number)) : 0.0F;
  const float mean = sum * share;
  if (bar == bar) return {bar, mean - bar, true};
  const float variance = fmaxf(fmaf(-mean, mean, squares * share), 0.0F);
  return {mean, fmaxf(__powf(variance, 0.5F), fabsf(mean) * 0x1p-12F), false};
}

// Of n candidates, of which 1 <= count < n are wanted, or up to `slack` more.
class Search {
 public:
  __device__ Search(uint32_t n, uint32_t count, uint32_t slack, Spread spread)
      : n_(n),
        count_(count),
        most_(count + slack),
        reach_low_(n),
        tail_(spread.tail),
        at_(spread.at),
        slope_(spread.tail ? spread.width : spread.width * 0.588F),
        target_(measure(count + slack / 2)) {}

  // Whether `low` is the bar, or all that reach it are wanted.
  __device__ bool found() const { return reach_low_ <= most_ || high_ - low_ == 1; }
  // The next key to count.
  __device__ uint32_t guess() {
    ++steps_;
    if (steps_ % 6 == 0 || steps_ > 30) return low_ + (high_ - low_) / 2;  // for odd scores
    const uint32_t key = to_key(fmaf(slope_, measure_ - target_, at_));
    return min(max(key, low_ + 1), high_ - 1);
  }
  // That so many reach it.
  __device__ void narrow(uint32_t key, uint32_t reach) {
    if (reach >= count_) {
      low_ = key;
      reach_low_ = reach;
    } else {
      high_ = key;
      reach_high_ = reach;
    }
    const float score = to_score(key);
    const float measured = measure(reach);
    const float slope = __fdividef(score - at_, measure_ - measured);
    if (slope > 0.0F && slope < INFINITY) slope_ = slope;
    at_ = score;
    measure_ = measured;
  }

  // The bar, once it is found.
  __device__ Bar bar() const {
    if (reach_low_ <= most_ && low_ > kLowestKey) return pass_from(low_);
    return {to_score(low_), count_ - reach_high_};
  }

 private:
  // What nearly falls evenly where scores rise: the logarithm of the share that reaches them, of a
  // tail; of that share's odds, for all scores, at their median and far from it.
  __device__ float measure(uint32_t reach) const {
    const float rest = static_cast<float>(tail_ ? n_ : n_ - reach);
    return __logf(__fdividef(static_cast<float>(reach) + 0.5F, rest + 0.5F));
  }

  uint32_t n_, count_, most_;
  // Two keys with the bar between them: `low` is reached by at least `count`, `high` by fewer.
  uint32_t low_ = kLowestKey, high_ = kHighestKey + 1;
  uint32_t reach_low_, reach_high_ = 0;
  bool tail_;
  float at_, measure_ = 0.0F;  // the score last counted, and its measure
  float slope_;                // of scores over the measure
  float target_;
  uint32_t steps_ = 0;
};

}  // namespace hisa::cuda::sm90
