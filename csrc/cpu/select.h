// Stage `select`: the best `count` of a stream of scores, for blocks and for tokens alike.
//
// A candidate is one 64-bit key, so that the order of preference is the order of integers and no
// two keys are equal:
//   bits 63..32  score, mapped to an unsigned integer that grows with it; NaN as -inf, -0 as +0
//   bits 31..1   inverted position: among equals the lower one wins
//   bit  0       the score was a NaN or -0, which the mapping has lost
//
// Candidates come in ascending order of position and stay in it. When the buffer is full, the best
// `count` are kept in place and the worst of them becomes the bar for all that follow; a later one
// has a higher position, so it must beat the bar's score. Each is looked at a constant number of
// times, whatever the scores, and nothing is ever dropped for lack of room.
#pragma once

#include <bit>
#include <cstdint>
#include <limits>

namespace hisa::cpu {

inline constexpr int64_t kSelectSlack = 256;  // room for offers between two compactions

class Selector {
 public:
  // Keys of buffer that choosing `count` out of at most `offers` candidates takes.
  static int64_t capacity(int64_t count, int64_t offers) {
    const int64_t streaming = 2 * count + kSelectSlack;
    return offers < streaming ? offers : streaming;
  }

  // `keys` holds `capacity` keys; `spare` as many, and may be shared between selectors.
  void reset(uint64_t* keys, uint64_t* spare, int64_t capacity, int64_t count) {
    keys_ = keys;
    spare_ = spare;
    capacity_ = capacity;
    count_ = count;
    size_ = 0;
    bar_ = -std::numeric_limits<float>::infinity();
    full_ = false;
  }

  // Offer candidates `position`, `position + 1`, ... with these scores.
  void offer(const float* scores, int64_t n, int64_t position);

  // Accept candidates `position` ... `position + n - 1` unseen; for rows whose candidates all fit.
  void take(int64_t n, int64_t position) {
    for (int64_t i = 0; i < n; ++i) keys_[size_++] = make_key(0.0F, position + i);
  }

  // Take over what another has kept, of candidates that all come later.
  void join(const Selector& later) {
    for (int64_t i = 0; i < later.size_; ++i) {
      if (size_ == capacity_) compact();
      keys_[size_] = later.keys_[i];
      size_ += static_cast<int64_t>(!full_ || later.keys_[i] >> 32 > bar_rank_);
    }
  }

  // Keep the best `count`, or all if there are fewer. Returns how many.
  int64_t finish() {
    if (size_ > count_) compact();
    return size_;
  }

  // The i-th kept candidate in ascending order of position; valid after finish().
  int64_t position(int64_t i) const {
    return static_cast<int64_t>(~static_cast<uint32_t>(keys_[i]) >> 1);
  }
  float score(int64_t i) const {
    const auto high = static_cast<uint32_t>(keys_[i] >> 32);
    const uint32_t bits = (high & kSign) != 0 ? high ^ kSign : ~high;
    const auto ranked = std::bit_cast<float>(bits);
    if ((keys_[i] & 1) == 0) return ranked;
    return ranked == 0.0F ? -0.0F : std::numeric_limits<float>::quiet_NaN();
  }

 private:
  static constexpr uint32_t kSign = 0x80000000U;

  static uint64_t make_key(float score, int64_t position) {
    const bool nan = score != score;
    const bool minus_zero = std::bit_cast<uint32_t>(score) == kSign;
    const float ranked = nan ? -std::numeric_limits<float>::infinity() : score + 0.0F;
    const auto bits = std::bit_cast<uint32_t>(ranked);
    const uint32_t high = (bits & kSign) != 0 ? ~bits : bits | kSign;
    const uint32_t low = (~static_cast<uint32_t>(position) << 1) | static_cast<uint32_t>(nan) |
                         static_cast<uint32_t>(minus_zero);
    return (static_cast<uint64_t>(high) << 32) | low;
  }

  void compact();  // keep the best count_ < size_ keys, in order

  uint64_t* keys_ = nullptr;
  uint64_t* spare_ = nullptr;
  int64_t capacity_ = 0;
  int64_t count_ = 0;
  int64_t size_ = 0;
  float bar_ = 0;      // with full_: a candidate must score more to be kept
  uint32_t bar_rank_ = 0;  // likewise: the upper half of its key must be more
  bool full_ = false;  // count_ candidates have been kept
};

}  // namespace hisa::cpu
