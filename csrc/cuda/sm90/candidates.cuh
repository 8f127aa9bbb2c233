// A row's candidates, and which of them pass a bar. Shared memory is busy with the operands of
// products, so up to 8192 scores are read once, into the registers of a warpgroup, and looked at
// there as often as need be. Beyond that they stay where they are.
#pragma once

#include "../select_bracket.cuh"

namespace hisa::cuda::sm90 {

// What the warps of the team tell each other.
struct alignas(16) Counts {
  uint32_t ends[2][kWarps];
  uint32_t sums[2][kWarps];
  uint32_t passing[4][kWarps];  // of four slabs each: see LaneCounts
};

// Candidates lie in slabs of 512; a thread has four adjacent ones of each.
inline constexpr uint32_t kSlab = kThreads * 4;

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

// A sum over the team, with a barrier. Two calls in a row have different turns, 0 and 1.
template <class Team>
__device__ __forceinline__ uint32_t sum(Counts& counts, uint32_t turn, uint32_t mine) {
  mine = __reduce_add_sync(~0U, mine);
  if (Team::thread() % 32 == 0) counts.sums[turn][Team::thread() / 32] = mine;
  Team::sync();
  const uint4 four = *reinterpret_cast<const uint4*>(counts.sums[turn]);
  return four.x + four.y + four.z + four.w;
}

// Make what lies behind the last of scores [n], up to a multiple of 4, pass no bar; positions may
// be null. All threads call it; it ends with a barrier.
template <class Team>
__device__ __forceinline__ void pad(float* scores, int32_t* positions, uint32_t n) {
  const uint32_t at = n + Team::thread();
  if (at < (n + 3) / 4 * 4) {
    scores[at] = NAN;
    if (positions != nullptr) positions[at] = 0;
  }
  Team::sync();
}

// In registers, up to kSlabs of them.
template <class Team, int kSlabs>
class Held {
  static constexpr int kQuads = kSlabs / 4;  // of slabs: 16 candidates of a thread
  static_assert(kSlabs % 4 == 0 && kSlabs <= 16);

 public:
  static constexpr uint32_t kMost = kSlabs * kSlab;

  // Of scores [n], n <= kMost, see pad().
  __device__ __forceinline__ Held(const float* scores, uint32_t n) {
#pragma unroll
    for (int s = 0; s < kSlabs; ++s) {
      const uint32_t at = s * kSlab + Team::thread() * 4;
      float4 four{NAN, NAN, NAN, NAN};
      if (at < n) four = *reinterpret_cast<const float4*>(scores + at);
      score_[s][0] = four.x, score_[s][1] = four.y, score_[s][2] = four.z, score_[s][3] = four.w;
    }
  }

  template <class Use>
  __device__ __forceinline__ void for_each(Use use) const {
#pragma unroll
    for (int s = 0; s < kSlabs; ++s)
#pragma unroll
      for (int j = 0; j < 4; ++j) use(score_[s][j], s * kSlab + Team::thread() * 4 + j);
  }

  // Find out which of them pass; returns how many. It ends with a barrier.
  __device__ __forceinline__ uint32_t pass(Counts& counts, Cut cut) {
    const uint32_t lane = Team::thread() % 32;
    uint32_t total = 0;
#pragma unroll
    for (int quad = 0; quad < kQuads; ++quad) passes_[quad] = 0;
    mark([&](float score, uint32_t) { return cut.bar.below(score); });
    if (cut.before > 0)
      mark([&](float score, uint32_t position) {
        // One after the other, or the compiler runs out of registers.
        return Cut{{ptx::here(cut.bar.score), 0}, cut.before}.ties(score, position);
      });
#pragma unroll
    for (int quad = 0; quad < kQuads; ++quad) {
      const LaneCounts mine(count_ones(passes_[quad]), lane);
      before_[quad] = mine.before;
      if (lane == 0) counts.passing[quad][Team::thread() / 32] = mine.total;
    }
    Team::sync();
#pragma unroll
    for (int quad = 0; quad < kQuads; ++quad)
#pragma unroll
      for (uint32_t w = 0; w < kWarps; ++w)
        total = __dp4a(counts.passing[quad][w], 0x01010101U, total);
    return total;
  }

  // use(position, score, bits, slot) for each slab in order: of its first candidate of this thread;
  // the scores of the four, a bit for each that passes, and the slot of the first one that does.
  template <class Use>
  __device__ __forceinline__ void for_slabs(Counts& counts, Use use) const {
    const uint32_t warp = Team::thread() / 32;
    uint32_t slot = 0;
#pragma unroll
    for (int quad = 0; quad < kQuads; ++quad) {
      // Two counts in a word each, since four warps' do not fit into a byte.
      uint32_t before[2] = {before_[quad] & 0xff00ffU, before_[quad] >> 8 & 0xff00ffU};
      uint32_t all[2] = {0, 0};
#pragma unroll
      for (uint32_t w = 0; w < kWarps; ++w) {
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
        use(s * kSlab + Team::thread() * 4, score_[s], passes_[quad] >> i * 4,
            slot + (before[i % 2] >> i / 2 * 16 & 0xffffU));
        slot += all[i % 2] >> i / 2 * 16 & 0xffffU;
      }
    }
  }

 private:
  template <class Wanted>
  __device__ __forceinline__ void mark(Wanted wanted) {
#pragma unroll
    for (int s = 0; s < kSlabs; ++s)
#pragma unroll
      for (int j = 0; j < 4; ++j)
        passes_[s / 4] |=
            wanted(score_[s][j], s * kSlab + Team::thread() * 4 + j) ? 1U << (s % 4 * 4 + j) : 0U;
  }

  float score_[kSlabs][4];
  uint32_t passes_[kQuads];  // a bit for each
  uint32_t before_[kQuads];  // how many pass of the lanes before, of each slab
};

// In memory, any number. Slower, and little code.
template <class Team>
class Stored {
 public:
  __device__ Stored(const float* scores, uint32_t n) : scores_(scores), n_(n) {}

  template <class Use>
  __device__ __forceinline__ void for_each(Use use) const {
#pragma unroll 1
    for (uint32_t i = Team::thread(); i < n_; i += kThreads) use(scores_[i], i);
  }
  __device__ __forceinline__ uint32_t pass(Counts& counts, Cut cut) {
    cut_ = cut;
    uint32_t mine = 0;
    for_each([&](float score, uint32_t i) { mine += cut.passes(score, i); });
    Team::sync();  // the last sum may have had the same turn
    return sum<Team>(counts, 0, mine);
  }
  template <class Use>
  __device__ __forceinline__ void for_slabs(Counts& counts, Use use) const {
    const uint32_t lane = Team::thread() % 32;
    const uint32_t warp = Team::thread() / 32;
    uint32_t slot = 0;
    uint32_t turn = 0;
#pragma unroll 1
    for (uint32_t slab = 0; slab < n_; slab += kSlab, turn ^= 1) {
      const uint32_t at = slab + Team::thread() * 4;
      float score[4];
      uint32_t bits = 0;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        score[j] = at + j < n_ ? scores_[at + j] : 0.0F;
        bits |= at + j < n_ && cut_.passes(score[j], at + j) ? 1U << j : 0U;
      }
      const LaneCounts mine(__popc(bits), lane);
      uint32_t* passing = counts.passing[turn];  // someone may still read those of the slab before
      if (lane == 0) passing[warp] = mine.total;
      Team::sync();
      uint32_t first = slot + mine.before;
      for (uint32_t w = 0; w < kWarps; ++w) {
        if (w < warp) first += passing[w];
        slot += passing[w];
      }
      use(at, score, bits, first);
    }
  }

 private:
  const float* scores_;
  uint32_t n_;
  Cut cut_;
};

// The key of the least of n scores; and in `above` the one behind that of the greatest.
template <class Team, class Scores>
__device__ __forceinline__ uint32_t find_ends(Counts& counts, const Scores& scores,
                                              uint32_t& above) {
  float low = INFINITY;  // NaN changes neither
  float high = -INFINITY;
  scores.for_each([&](float score, uint32_t) {
    low = fminf(low, score);
    high = fmaxf(high, score);
  });
  const uint32_t least = __reduce_min_sync(~0U, to_key(low));
  const uint32_t most = __reduce_max_sync(~0U, to_key(high));
  if (Team::thread() % 32 == 0) {
    counts.ends[0][Team::thread() / 32] = least;
    counts.ends[1][Team::thread() / 32] = most;
  }
  Team::sync();
  const uint4 lows = *reinterpret_cast<const uint4*>(counts.ends[0]);
  const uint4 highs = *reinterpret_cast<const uint4*>(counts.ends[1]);
  above = max(max(highs.x, highs.y), max(highs.z, highs.w)) + 1;
  return min(min(min(lows.x, lows.y), min(lows.z, lows.w)), above - 1);  // if all are NaN
}

// What the best `count` of n scores pass, or up to `slack` more of the next best; `stored` are the
// same scores, for what is rare. All threads call it.
template <class Team, class Scores>
__device__ __forceinline__ Cut find_cut(Counts& counts, const Scores& scores, Stored<Team> stored,
                                        uint32_t n, uint32_t count, uint32_t slack) {
  if (n <= count) return {{}, n};
  uint32_t above = 0;
  const uint32_t least = find_ends<Team>(counts, scores, above);
  Bracket bracket{least, above, n, 0};
  // Whether all reach the least score: NaN does not, unless that is -inf, which is as bad.
  bool sure = least == kLowestKey;
  uint32_t turn = 0;
#pragma unroll 1
  for (;; turn ^= 1) {
    uint32_t key = least;
    if (!bracket.found(count, slack))
      key = bracket.guess(count);
    else if (bracket.low > least || sure)
      break;
    else
      sure = true;
    const float score = to_score(key);
    float mine = 0.0F;  // takes an instruction less than an integer
    scores.for_each([&](float other, uint32_t) { mine += other >= score ? 1.0F : 0.0F; });
    const uint32_t reach = sum<Team>(counts, turn, static_cast<uint32_t>(mine));
    bracket.narrow(key, reach, count);
    if (key == least && reach < count) {
      bracket.low = kLowestKey;
      break;
    }
  }
  if (bracket.reach_low <= count + slack && bracket.low > kLowestKey)
    return {pass_from(bracket.low), 0};

  // Only the first of those that equal the bar pass.
  const Bar bar{to_score(bracket.low), count - bracket.reach_high};
  uint32_t before = 0;  // what fewer than that many come before
  Team::sync();  // the last sum may have had the same turn
#pragma unroll 1
  for (uint32_t bit = 1U << 31; bit > 0; bit >>= 1) {
    const uint32_t guess = before | bit;
    if (guess > n) continue;
    const Cut cut{bar, guess};
    uint32_t mine = 0;
    stored.for_each([&](float score, uint32_t i) { mine += cut.ties(score, i); });
    if (sum<Team>(counts, turn, mine) <= bar.ties) before = guess;
    turn ^= 1;
  }
  return {bar, before};
}

}  // namespace hisa::cuda::sm90
