// Stage `select`: the best `count` of a row's scores, for blocks and for tokens alike.
//
// A candidate's key has 64 bits: its score, mapped to an unsigned integer that grows with it (NaN
// as -inf, -0 as +0), then its inverted position. The low half is never stored: candidates stay in
// ascending order of position, so among equal scores the first ones win.
//
// find_bar() finds the worst score to be kept, 11 bits of its key at a time; pass() moves on what
// is as good. Whatever the scores, every candidate is looked at a constant number of times, and
// none is ever dropped for lack of room. All functions are for blocks of kCount threads.
#pragma once

#include "memory.cuh"
#include "ptx/shared.cuh"
#include "ptx/thread.cuh"

namespace hisa::cuda {

// Grows with the score; at least 0x007fffff, the key of -inf.
__device__ __forceinline__ uint32_t to_key(float score) {
  const uint32_t bits = __float_as_uint(fmaxf(score, -INFINITY) + 0.0F);
  return bits ^ (static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | 0x80000000U);
}

__device__ __forceinline__ float to_score(uint32_t key) {
  return __uint_as_float((key & 0x80000000U) != 0 ? key ^ 0x80000000U : ~key);
}

// Sum over the threads before this one. All threads call it, after a barrier.
template <int kCount>
__device__ __forceinline__ uint32_t sum_before(SharedMemory& memory, uint32_t mine) {
  const uint32_t thread = ptx::this_thread();
  const int lane = thread % 32;
  const int warp = thread / 32;
  uint32_t up_to = mine;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const uint32_t other = __shfl_up_sync(~0U, up_to, step);
    if (lane >= step) up_to += other;
  }
  if (lane == 31) memory.sums[0][warp] = up_to;
  __syncthreads();
  uint32_t before = up_to - mine;
  uint32_t total = 0;
#pragma unroll
  for (int w = 0; w < kCount / 32; ++w) {
    if (w == warp) before += total;
    total += memory.sums[0][w];
  }
  return before;
}

// Two counts of a warp, the second in the high half: those of the warps before this one, and of all
// in `total`. All threads call it, with another `parity` than in the call before if no barrier lies
// between.
template <int kCount>
__device__ __forceinline__ uint2 sum_of_warps(SharedMemory& memory, int parity, uint32_t mine,
                                              uint2& total) {
  const uint32_t thread = ptx::this_thread();
  const int warp = thread / 32;
  if (thread % 32 == 0) memory.sums[parity][warp] = mine;
  __syncthreads();
  uint2 before{0, 0};
  total = {0, 0};
#pragma unroll
  for (int w = 0; w < kCount / 32; ++w) {
    if (w == warp) before = total;
    const uint32_t counts = memory.sums[parity][w];
    total.x += counts & 0xffffU;
    total.y += counts >> 16;
  }
  return before;
}

// Find the bin with the `need`-th highest of the counted keys, into memory.found; the histogram is
// zero again. All threads call it, after a barrier; it ends with one.
template <int kCount>
__device__ inline void find_bin(SharedMemory& memory, uint32_t need) {
  constexpr int kBins = kHistogram / kCount;  // per thread; thread 0 has the highest ones
  static_assert(kBins % 4 == 0, "whole vectors");
  const uint32_t first = (kCount - 1 - ptx::this_thread()) * kBins;
  uint32_t counts[kBins];
  auto* bins = reinterpret_cast<uint4*>(histogram(memory) + first);
  uint32_t sum = 0;
#pragma unroll
  for (int i = 0; i < kBins / 4; ++i) {
    reinterpret_cast<uint4*>(counts)[i] = bins[i];
    bins[i] = uint4{0, 0, 0, 0};
  }
#pragma unroll
  for (int i = 0; i < kBins; ++i) sum += counts[i];

  uint32_t before = sum_before<kCount>(memory, sum);
  if (before < need && need <= before + sum) {
    uint32_t bin = first;
#pragma unroll
    for (int step = 1; step < kBins; step *= 2) {
      const int half = kBins / 2 / step;
      uint32_t upper = 0;
#pragma unroll
      for (int i = 0; i < half; ++i) upper += counts[half + i];
      const bool high = need <= before + upper;
      if (high) bin += half;
      if (!high) before += upper;
#pragma unroll
      for (int i = 0; i < half; ++i) counts[i] = high ? counts[half + i] : counts[i];
    }
    memory.found = {bin, before, counts[0]};
  }
  __syncthreads();
}

// Count the digits [low, low + width) of the keys of scores [n]; behind the first digit, only of
// keys whose higher bits are `prefix`.
template <bool kFirst, int kCount>
__device__ __forceinline__ void tally(uint32_t* histogram, const float* scores, uint32_t n, int low,
                                      int width, uint32_t prefix) {
  constexpr uint32_t kVectors = 2;  // of four scores, in flight
  const uint32_t bins = ptx::shared_address(histogram);
  const auto count = [&](float score) {
    const uint32_t key = to_key(score);
    const uint32_t digit = key >> low & ((1U << width) - 1);
    ptx::add(bins + digit * 4, kFirst || key >> (low + width) == prefix ? 1 : 0);  // no branch
  };
  const auto* vectors = reinterpret_cast<const float4*>(scores);
  const uint32_t whole = n / 4;
  uint32_t slab = 0;
#pragma unroll 1
  for (; slab + kVectors * kCount <= whole; slab += kVectors * kCount) {
    float4 vector[kVectors];
#pragma unroll
    for (uint32_t j = 0; j < kVectors; ++j)
      vector[j] = vectors[slab + j * kCount + ptx::this_thread()];
#pragma unroll
    for (const float4& four : vector)
      for (const float score : {four.x, four.y, four.z, four.w}) count(score);
  }
#pragma unroll 1
  for (uint32_t i = slab * 4 + ptx::this_thread(); i < n; i += kCount) count(scores[i]);
}

// All candidates from `key` on pass; there are lower ones.
__device__ __forceinline__ Bar pass_from(uint32_t key) {
  --key;
  if (key == 0x7fffffffU) --key;  // -0, which no score has as its key
  return {to_score(key), 0};
}

// The bar that exactly the best `count` of scores [n] pass; 1 <= count < n. All threads call it,
// after a barrier.
template <int kCount>
__device__ __forceinline__ Bar find_bar(SharedMemory& memory, const float* scores, uint32_t n,
                                        uint32_t count) {
  for (int i = ptx::this_thread(); i < kHistogram / 4; i += kCount)
    reinterpret_cast<uint4*>(histogram(memory))[i] = uint4{0, 0, 0, 0};
  __syncthreads();
  uint32_t prefix = 0;  // the bits of the bar's key that are known
  uint32_t need = count;
#pragma unroll 1
  for (int digit = 0; digit < 3; ++digit) {
    const int low = digit == 0 ? 21 : digit == 1 ? 10 : 0;  // 11 bits, 11 bits, then 10
    const int width = digit == 2 ? 10 : 11;
    if (digit == 0)
      tally<true, kCount>(histogram(memory), scores, n, 21, 11, 0);
    else
      tally<false, kCount>(histogram(memory), scores, n, low, width, prefix);
    __syncthreads();
    find_bin<kCount>(memory, need);
    const auto found = memory.found;
    prefix = prefix << width | found.bin;
    need -= found.before;
    if (found.count == need) return pass_from(prefix << low);  // all of the bin, but not all n
  }
  return {to_score(prefix), need};
}

// For each of four groups of four bits, a byte with the number of ones.
__device__ __forceinline__ uint32_t count_ones(uint32_t groups) {
  groups -= groups >> 1 & 0x5555U;
  groups = (groups & 0x3333U) + (groups >> 2 & 0x3333U);
  groups = (groups | groups << 8) & 0x00ff00ffU;
  return (groups | groups << 4) & 0x0f0f0f0fU;
}

// Counts of a lane, one or several in a word: of the lanes before it, and of the warp. sum() and
// byte() are for four, one per byte.
struct LaneCounts {
  uint32_t before;
  uint32_t total;

  __device__ explicit LaneCounts(uint32_t mine, uint32_t lane) {
    uint32_t up_to = mine;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const uint32_t other = __shfl_up_sync(~0U, up_to, step);
      if (lane >= step) up_to += other;
    }
    before = up_to - mine;
    total = __shfl_sync(~0U, up_to, 31);
  }
  __device__ uint32_t sum() const { return __dp4a(total, 0x01010101U, 0U); }
  __device__ static uint32_t byte(uint32_t four, int i) { return four >> 8 * i & 0xffU; }
};

// Hand the candidates [0, n) that pass the bar to `write(slot, score, i)`, in order, slots from 0
// on; returns how many. Given `values`, that is values[i] instead of i. `write` may overwrite what
// candidates come from, since none moves up.
template <bool kTies, bool kValues, int kCount, class Write>
__device__ __forceinline__ uint32_t move(SharedMemory& memory, const float* scores,
                                         const int32_t* values, uint32_t n, Bar bar, Write write) {
  constexpr uint32_t kVectors = 4;  // of four candidates, of a lane in a slab
  constexpr uint32_t kStride = 32 * 4;  // between a lane's vectors
  const uint32_t lane = ptx::this_thread() % 32;
  uint32_t above = 0;  // in the slabs so far
  uint32_t equal = 0;
  int parity = 0;
#pragma unroll 1
  for (uint32_t slab = 0; slab < n; slab += kCount * kVectors * 4, parity ^= 1) {
    const uint32_t first = slab + ptx::this_thread() / 32 * kVectors * kStride + lane * 4;
    float score[kVectors][4];
    int32_t value[kVectors][4];
    uint32_t is_above = 0;  // a bit for each candidate
    uint32_t is_equal = 0;
#pragma unroll
    for (uint32_t v = 0; v < kVectors; ++v) {
      const uint32_t at = min(first + v * kStride, (n - 1) / 4 * 4);
      const float4 four = *reinterpret_cast<const float4*>(scores + at);
      score[v][0] = four.x, score[v][1] = four.y, score[v][2] = four.z, score[v][3] = four.w;
      if constexpr (kValues) {
        const int4 of = *reinterpret_cast<const int4*>(values + at);
        value[v][0] = of.x, value[v][1] = of.y, value[v][2] = of.z, value[v][3] = of.w;
      }
    }
#pragma unroll
    for (uint32_t v = 0; v < kVectors; ++v) {
      const uint32_t from = first + v * kStride;
      const uint32_t real = (1U << (from < n ? min(n - from, 4U) : 0U)) - 1;
      uint32_t bits = 0;
      uint32_t ties = 0;
#pragma unroll
      for (uint32_t j = 0; j < 4; ++j) {
        if constexpr (!kValues) value[v][j] = static_cast<int32_t>(from + j);
        bits |= bar.below(score[v][j]) ? 1U << j : 0U;
        if constexpr (kTies) ties |= bar.equals(score[v][j]) ? 1U << j : 0U;
      }
      is_above |= (bits & real) << 4 * v;
      is_equal |= (ties & real) << 4 * v;
    }
    const LaneCounts counts(count_ones(is_above), lane);
    const LaneCounts tie_counts(kTies ? count_ones(is_equal) : 0, lane);
    uint2 total;
    const uint2 before =
        sum_of_warps<kCount>(memory, parity, counts.sum() | tie_counts.sum() << 16, total);
    uint32_t taken = above + before.x;  // before the vector
    uint32_t ties = equal + before.y;
#pragma unroll
    for (uint32_t v = 0; v < kVectors; ++v) {
      uint32_t slot = taken + LaneCounts::byte(counts.before, v);
      uint32_t rank = ties + LaneCounts::byte(tie_counts.before, v);
#pragma unroll
      for (uint32_t j = 0; j < 4; ++j) {
        const bool passes = (is_above >> (4 * v + j) & 1) != 0;
        const bool tie = kTies && (is_equal >> (4 * v + j) & 1) != 0;
        if (passes || (tie && rank < bar.ties))
          write(slot + min(rank, bar.ties), score[v][j], value[v][j]);
        slot += passes;
        rank += tie;
      }
      taken += LaneCounts::byte(counts.total, v);
      ties += LaneCounts::byte(tie_counts.total, v);
    }
    above += total.x;
    equal += total.y;
  }
  __syncthreads();
  return above + min(equal, bar.ties);
}

// move(), for any bar. All threads call it, after a barrier; it ends with one.
template <bool kValues, int kCount, class Write>
__device__ __forceinline__ uint32_t pass(SharedMemory& memory, const float* scores,
                                         const int32_t* values, uint32_t n, Bar bar, Write write) {
  return bar.ties > 0 ? move<true, kValues, kCount>(memory, scores, values, n, bar, write)
                      : move<false, kValues, kCount>(memory, scores, values, n, bar, write);
}

// Move the chunk of positions from `begin` on into the buffer, as far as it passes the bar that
// the stage's best so far have set. If it might not fit, the buffer is cut to the best `count`
// first, and the bar rises. All threads call it, after a barrier; it ends with one.
__device__ __forceinline__ void add_to_buffer(SharedMemory& memory, uint32_t begin) {
  const Region region = memory.region;
  const Source source = memory.stage.source;
  const uint32_t n = chunk_at(memory, begin);
  float* scores = region.buffer_scores();
  int32_t* values = region.buffer_values();
  const auto store = [&](uint32_t slot, float score, int32_t value) {
    scores[slot] = score;
    values[slot] = value;
  };
  uint32_t size = memory.buffered;
  Bar bar = memory.bar;
  if (size + n > region.capacity) {
    bar = find_bar<kThreads>(memory, scores, size, memory.stage.count);
    size = pass<true, kThreads>(memory, scores, values, size, bar, store);
    bar.ties = 0;  // later candidates lose a tie
  }
  const uint32_t base = size;
  size += pass<false, kThreads>(memory, region.scores, nullptr, n, bar,
                                [&](uint32_t slot, float score, int32_t i) {
                                  store(base + slot, score, source.value(begin + i));
                                });
  if (ptx::this_thread() == 0) {
    memory.buffered = size;
    memory.bar = bar;
  }
  __syncthreads();
}

// Write the best `count` of a stage, whose candidates are all scored. All threads call it, after a
// barrier; it ends with one.
template <int kCount = kThreads>
__device__ __forceinline__ void write_best(SharedMemory& memory) {
  const Region region = memory.region;
  const Stage stage = memory.stage;
  const bool whole = region.holds(stage.source);
  float* scores = whole ? region.scores : region.buffer_scores();
  const uint32_t size = whole ? stage.source.size : memory.buffered;
  const Bar bar = size > stage.count ? find_bar<kCount>(memory, scores, size, stage.count) : Bar{};
  const auto write_score = [&](uint32_t slot, float score) {
    if (stage.scores != nullptr) stage.scores[slot] = score;
  };
  if (whole) {  // where they are first, since what they are takes longer to find out
    const uint32_t found = pass<false, kCount>(memory, scores, nullptr, size, bar,
                                               [&](uint32_t slot, float score, int32_t i) {
                                                 write_score(slot, score);
                                                 scores[slot] = __int_as_float(i);
                                               });
    for (uint32_t slot = ptx::this_thread(); slot < found; slot += kCount)
      stage.values[slot] = stage.source.value(__float_as_uint(scores[slot]));
    __syncthreads();
  } else {
    pass<true, kCount>(memory, scores, region.buffer_values(), size, bar,
                       [&](uint32_t slot, float score, int32_t value) {
                         write_score(slot, score);
                         stage.values[slot] = value;
                       });
  }
}

// Tokens whose scores nobody needs, since all of them are selected; and -1 in unused slots. The
// first kCount threads of the block call it.
template <int kCount = kThreads>
__device__ __forceinline__ void finish_row(const Output& output, int64_t m, const Stage& stage,
                                           bool scored) {
  int32_t* indices = output.indices + m * output.topk;
  if (!scored)
    for (uint32_t i = ptx::this_thread(); i < stage.count; i += kCount)
      indices[i] = stage.source.value(i);
  for (int64_t i = stage.count + ptx::this_thread(); i < output.topk; i += kCount) {
    indices[i] = -1;
    if (output.scores != nullptr) output.scores[m * output.topk + i] = -INFINITY;
  }
}

}  // namespace hisa::cuda
