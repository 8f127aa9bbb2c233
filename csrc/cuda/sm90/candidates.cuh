// A row's candidates, and which of them pass a bar. Shared memory is busy with the operands of
// products, so up to 8192 scores are read once, into registers, and looked at there as often as
// need be. Beyond that they stay where they are.
#pragma once

#include <type_traits>

#include "../ptx/shared.cuh"
#include "search.cuh"

namespace hisa::cuda::sm90 {

// The threads that select: the first ones of a block.
inline constexpr uint32_t kSelectors = 128;
inline constexpr uint32_t kSelectorWarps = kSelectors / 32;
__device__ __forceinline__ uint32_t selector() { return ptx::this_thread(); }
__device__ __forceinline__ void sync_selectors() { ptx::sync_some<kSelectors>(); }

// What their warps tell each other.
struct alignas(16) Counts {
  float spread[2][kSelectorWarps];
  uint32_t sums[2][kSelectorWarps];
  uint32_t passing[4][kSelectorWarps];  // of four slabs each: see LaneCounts
};

// Candidates lie in slabs of 512; a thread has four adjacent ones of each.
inline constexpr uint32_t kSlab = kSelectors * 4;

// Of those that equal the bar, the ones before position `before` pass.
struct Cut {
  Bar bar;
  uint32_t before;

  __device__ bool ties(float score, uint32_t position) const {
    return position < before && bar.equals(score);
  }
  __device__ bool passes(float score, uint32_t position) const {
    return bar.below(score) || ties(score, position);
  }
};

// A sum over all of them, with a barrier. Two calls in a row have different turns, 0 and 1.
__device__ __forceinline__ uint32_t sum(Counts& counts, uint32_t turn, uint32_t mine) {
  mine = __reduce_add_sync(~0U, mine);
  if (selector() % 32 == 0) counts.sums[turn][selector() / 32] = mine;
  sync_selectors();
  uint32_t total = 0;
#pragma unroll
  for (const uint32_t of_warp : counts.sums[turn]) total += of_warp;
  return total;
}

// Likewise of how many lie before a thread, given how many it has; `total` of all.
__device__ __forceinline__ uint32_t sum_before(Counts& counts, uint32_t turn, uint32_t mine,
                                               uint32_t& total) {
  const uint32_t warp = selector() / 32;
  const LaneCounts lanes(mine, selector() % 32);
  if (selector() % 32 == 0) counts.sums[turn][warp] = lanes.total;
  sync_selectors();
  uint32_t before = lanes.before;
  total = 0;
#pragma unroll
  for (uint32_t w = 0; w < kSelectorWarps; ++w) {
    const uint32_t of_warp = counts.sums[turn][w];
    if (w < warp) before += of_warp;
    total += of_warp;
  }
  return before;
}

// Make what lies behind the last of scores [n], up to a multiple of 4, pass no bar; positions may
// be null. All threads call it; it ends with a barrier.
__device__ __forceinline__ void pad(float* scores, int32_t* positions, uint32_t n) {
  const uint32_t at = n + selector();
  if (at < (n + 3) / 4 * 4) {
    scores[at] = NAN;
    if (positions != nullptr) positions[at] = 0;
  }
  sync_selectors();
}

// A bit for each of 16 numbers of which it is true. They are the low bits of a float, since a
// comparison and a multiply-add are two instructions.
template <class IsWanted>
__device__ __forceinline__ uint32_t find_16(IsWanted is_wanted) {
  float bits = 0x1p23F;
#pragma unroll
  for (int i = 0; i < 16; ++i)
    bits = fmaf(is_wanted(i) ? 1.0F : 0.0F, static_cast<float>(1 << i), bits);
  return __float_as_uint(bits) & 0xffffU;
}

// For for_slabs().
struct Nothing {
  __device__ void operator()(int, uint32_t) const {}
};

// In registers, up to kSlabs of them; scores lie in shared memory.
template <int kSlabs>
class Held {
  static constexpr int kQuads = kSlabs / 4;  // of slabs: 16 candidates of a thread
  static_assert(kSlabs % 4 == 0 && kSlabs <= 16);

 public:
  static constexpr uint32_t kMost = kSlabs * kSlab;
  template <class T>
  using Array = ptx::SharedArray<T>;

  // Of scores [n], n <= kMost, see pad().
  __device__ __forceinline__ Held(Array<float> scores, uint32_t n) : whole_(n / kSlab) {
#pragma unroll
    for (int s = 0; s < kSlabs; ++s) {
      const uint32_t at = s * kSlab + selector() * 4;
#pragma unroll
      for (int j = 0; j < 4; ++j) score_[s][j] = NAN;
      if (at < n) scores.load_4(at, score_[s]);
    }
  }

  // use(score) for some of the candidates, from all over; how many those are of all threads.
  template <class Use>
  __device__ __forceinline__ uint32_t sample(Use use) const {
#pragma unroll
    for (int s = 0; s < kSlabs; ++s)
      if (s < whole_) use(score_[s][s % 4]);
    return whole_ * kSelectors;
  }

  // Mark those above a bar; how many of this thread's are.
  __device__ __forceinline__ uint32_t mark(float bar) {
    marked_ = bar;
    uint32_t number = 0;
#pragma unroll
    for (int quad = 0; quad < kQuads; ++quad) {
      passes_[quad] = find_in(quad, [&](float score) { return score > bar; });
      number += static_cast<uint32_t>(__popc(passes_[quad]));
    }
    return number;
  }

  // Find out which of them pass; returns how many. It ends with a barrier.
  __device__ __forceinline__ uint32_t pass(Counts& counts, Cut cut) {
    const uint32_t lane = selector() % 32;
    uint32_t total = 0;
    if (!(marked_ == cut.bar.score)) mark(cut.bar.score);
    if (cut.before > 0) mark_ties(cut);
#pragma unroll
    for (int quad = 0; quad < kQuads; ++quad) {
      const LaneCounts mine(count_ones(passes_[quad]), lane);
      before_[quad] = mine.before;
      if (lane == 0) counts.passing[quad][selector() / 32] = mine.total;
    }
    sync_selectors();
#pragma unroll
    for (int quad = 0; quad < kQuads; ++quad)
#pragma unroll
      for (uint32_t w = 0; w < kSelectorWarps; ++w)
        total = __dp4a(counts.passing[quad][w], 0x01010101U, total);
    return total;
  }

  // For each slab in order use(i, at, score, bits, slot): its first candidate of this thread; the
  // scores of the four, a bit for each that passes, and the slot of the first one that does. Before
  // that prepare(i, at) for four slabs, 0 <= i < 4, and a barrier.
  template <class Prepare, class Use>
  __device__ __forceinline__ void for_slabs(Counts& counts, Prepare prepare, Use use) const {
    const uint32_t warp = selector() / 32;
    uint32_t slot = 0;
#pragma unroll
    for (int quad = 0; quad < kQuads; ++quad) {
      if constexpr (!std::is_same_v<Prepare, Nothing>) {
#pragma unroll
        for (int i = 0; i < 4; ++i) prepare(i, (quad * 4 + i) * kSlab + selector() * 4);
        sync_selectors();
      }
      // Two counts in a word each, since those of all warps do not fit into a byte.
      uint32_t before[2] = {before_[quad] & 0xff00ffU, before_[quad] >> 8 & 0xff00ffU};
      uint32_t all[2] = {0, 0};
#pragma unroll
      for (uint32_t w = 0; w < kSelectorWarps; ++w) {
        const uint32_t four = counts.passing[quad][w];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const uint32_t two = four >> 8 * i & 0xff00ffU;
          if (w < warp) before[i] += two;
          all[i] += two;
        }
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int s = quad * 4 + i;
        use(i, s * kSlab + selector() * 4, score_[s], passes_[quad] >> i * 4,
            slot + (before[i % 2] >> i / 2 * 16 & 0xffffU));
        slot += all[i % 2] >> i / 2 * 16 & 0xffffU;
      }
    }
  }

 private:
  // A bit for each of the candidates of a quad of which it is true.
  template <class IsWanted>
  __device__ __forceinline__ uint32_t find_in(int quad, IsWanted is_wanted) const {
    return find_16([&](int i) { return is_wanted(score_[quad * 4 + i / 4][i % 4]); });
  }

  // Of those that are not above the bar, mark what equals it before position cut.before.
  __device__ __forceinline__ void mark_ties(Cut cut) {
    const bool lowest = cut.bar.score == -INFINITY;  // which NaN equals too
#pragma unroll
    for (int quad = 0; quad < kQuads; ++quad) {
      const float bar = ptx::here(cut.bar.score);  // quad by quad, or there are too few registers
      uint32_t equal = find_in(quad, [&](float score) { return score == bar; });
      if (lowest) equal = ~passes_[quad];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t at = (quad * 4 + i) * kSlab + selector() * 4;
        const uint32_t before = cut.before > at ? min(cut.before - at, 4U) : 0;
        passes_[quad] |= equal & ((1U << before) - 1) << 4 * i;
      }
    }
  }

  int whole_;  // slabs without a gap
  float marked_ = NAN;  // the bar that was marked last
  float score_[kSlabs][4];
  uint32_t passes_[kQuads];  // a bit for each
  uint32_t before_[kQuads];  // how many pass of the lanes before, of each slab
};

// ptx::SharedArray for any memory.
template <class T>
struct AnyArray {
  T* data;

  __device__ __forceinline__ explicit AnyArray(T* data) : data(data) {}
  __device__ __forceinline__ void load_4(uint32_t i, T (&x)[4]) const {
    for (int j = 0; j < 4; ++j) x[j] = data[i + j];
  }
  __device__ __forceinline__ void skip(uint32_t n) { data += n; }
  __device__ __forceinline__ void push_4(uint32_t wanted, const T (&x)[4]) const {
    T* to = data;
    for (int j = 0; j < 4; ++j)
      if ((wanted & 1U << j) != 0) *to++ = x[j];
  }
};

// In any memory, any number. Slower, and little code.
class Stored {
 public:
  template <class T>
  using Array = AnyArray<T>;

  __device__ Stored(Array<float> scores, uint32_t n) : scores_(scores.data), n_(n) {}

  template <class Use>
  __device__ __forceinline__ void for_each(Use use) const {
#pragma unroll 1
    for (uint32_t i = selector(); i < n_; i += kSelectors) use(scores_[i], i);
  }
  template <class Use>
  __device__ __forceinline__ uint32_t sample(Use use) const {
    const uint32_t step = n_ / kSlab;
#pragma unroll 1
    for (uint32_t i = 0; step > 0 && i < 4; ++i) use(scores_[(i * kSelectors + selector()) * step]);
    return step > 0 ? kSlab : 0;
  }
  __device__ __forceinline__ uint32_t mark(float bar) {
    uint32_t number = 0;
    for_each([&](float score, uint32_t) { number += score > bar; });
    return number;
  }
  __device__ __forceinline__ uint32_t pass(Counts& counts, Cut cut) {
    cut_ = cut;
    uint32_t mine = 0;
    for_each([&](float score, uint32_t i) { mine += cut.passes(score, i); });
    sync_selectors();  // the last sum may have had the same turn
    return sum(counts, 0, mine);
  }
  template <class Prepare, class Use>
  __device__ __forceinline__ void for_slabs(Counts& counts, Prepare prepare, Use use) const {
    uint32_t slot = 0;
    uint32_t turn = 1;
#pragma unroll 1
    for (uint32_t slab = 0; slab < n_; slab += kSlab, turn ^= 1) {
      const uint32_t at = slab + selector() * 4;
      float score[4];
      uint32_t bits = 0;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        score[j] = at + j < n_ ? scores_[at + j] : 0.0F;
        bits |= at + j < n_ && cut_.passes(score[j], at + j) ? 1U << j : 0U;
      }
      uint32_t total = 0;
      prepare(0, at);
      const uint32_t before = sum_before(counts, turn, static_cast<uint32_t>(__popc(bits)), total);
      use(0, at, score, bits, slot + before);
      slot += total;
    }
  }

 private:
  const float* scores_;
  uint32_t n_;
  Cut cut_;
};

// All threads call it; it has a barrier.
template <class Scores>
__device__ __forceinline__ Spread find_spread(Counts& counts, const Scores& scores, float bar) {
  float sums[2] = {};  // and of squares
  const uint32_t number = scores.sample([&](float score) {
    sums[0] += score;
    sums[1] = fmaf(score, score, sums[1]);
  });
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) sums[i] += __shfl_xor_sync(~0U, sums[i], mask);
    if (selector() % 32 == 0) counts.spread[i][selector() / 32] = sums[i];
  }
  sync_selectors();
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    sums[i] = 0.0F;
#pragma unroll
    for (const float of_warp : counts.spread[i]) sums[i] += of_warp;
  }
  return make_spread(sums[0], sums[1], number, bar);
}

// What the best `count` of n scores pass, or up to `slack` more of the next best; `stored` are the
// same scores, for what is rare. All passed a bar, or it is NaN. All threads call it.
template <class Scores>
__device__ __forceinline__ Cut find_cut(Counts& counts, Scores& scores, Stored stored, uint32_t n,
                                        uint32_t count, uint32_t slack, float passed) {
  if (n <= count) return {{}, n};
  Search search(n, count, slack, find_spread(counts, scores, passed));
  uint32_t turn = 0;
#pragma unroll 1
  for (; !search.found(); turn ^= 1) {
    const uint32_t key = search.guess();
    search.narrow(key, sum(counts, turn, scores.mark(pass_from(key).score)));
  }
  const Bar bar = search.bar();
  if (bar.ties == 0) return {bar, 0};

  // Only the first of those that equal the bar pass.
  uint32_t before = 0;  // what fewer than that many come before
  sync_selectors();  // the last sum may have had the same turn
#pragma unroll 1
  for (uint32_t bit = 1U << 31; bit > 0; bit >>= 1) {
    const uint32_t guess = before | bit;
    if (guess > n) continue;
    const Cut cut{bar, guess};
    uint32_t mine = 0;
    stored.for_each([&](float score, uint32_t i) { mine += cut.ties(score, i); });
    if (sum(counts, turn, mine) <= bar.ties) before = guess;
    turn ^= 1;
  }
  return {bar, before};
}

}  // namespace hisa::cuda::sm90
