#include "select.h"

#include <algorithm>
#include <array>
#include <functional>

namespace hisa::cpu {
namespace {

// The count-th largest of n distinct keys, which it reorders.
//
// Quickselect without a branch on the data: which side a key goes to is a coin toss, and a wrong
// guess costs more than the move. Pivots that keep failing to split leave the rest to the standard
// library, whose worst case is bounded.
uint64_t nth_largest(uint64_t* keys, int64_t n, int64_t count) {
  constexpr int64_t kSmall = 32;
  constexpr int kMaxRounds = 40;
  for (int round = 0; round < kMaxRounds && n > kSmall; ++round) {
    std::array<uint64_t, 5> sample{};
    for (size_t i = 0; i < sample.size(); ++i)
      sample[i] = keys[(2 * static_cast<int64_t>(i) + 1) * n / 10];
    std::sort(sample.begin(), sample.end());
    const uint64_t pivot = sample[2];
    int64_t above = 0;  // keys[0, above) are at least the pivot
    for (int64_t i = 0; i < n; ++i) {
      const uint64_t key = keys[i];
      keys[i] = keys[above];
      keys[above] = key;
      above += static_cast<int64_t>(key >= pivot);
    }
    if (count <= above) {
      n = above;
    } else {
      keys += above;
      n -= above;
      count -= above;
    }
  }
  std::nth_element(keys, keys + (count - 1), keys + n, std::greater<>());
  return keys[count - 1];
}

template <int64_t n>
bool any_above(const float* scores, float bar) {
  int any = 0;
  for (int64_t i = 0; i < n; ++i) any |= static_cast<int>(scores[i] > bar);
  return any != 0;
}

}  // namespace

void Selector::offer(const float* scores, int64_t n, int64_t position) {
  constexpr int64_t kChunk = 16;  // looked at together: mostly none of them beats the bar
  for (int64_t i = 0; i < n;) {
    if (size_ == capacity_) compact();
    if (full_ && n - i >= kChunk && !any_above<kChunk>(scores + i, bar_)) {
      i += kChunk;
      continue;
    }
    const int64_t end = std::min({n, i + kChunk, i + capacity_ - size_});
    for (; i < end; ++i) {
      keys_[size_] = make_key(scores[i], position + i);
      size_ += static_cast<int64_t>(!full_ || scores[i] > bar_);
    }
  }
}

void Selector::compact() {
  std::copy(keys_, keys_ + size_, spare_);
  const uint64_t worst = nth_largest(spare_, size_, count_);
  int64_t kept = 0;
  for (int64_t i = 0; i < size_; ++i) {
    const uint64_t key = keys_[i];
    keys_[kept] = key;
    kept += static_cast<int64_t>(key >= worst);
  }
  size_ = kept;
  full_ = true;
  const auto high = static_cast<uint32_t>(worst >> 32);
  bar_rank_ = high;
  bar_ = std::bit_cast<float>((high & kSign) != 0 ? high ^ kSign : ~high);
}

}  // namespace hisa::cpu
