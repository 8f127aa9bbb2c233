// Stage `select`: the best `count` of a row's scores, for blocks and for tokens alike.
//
// A candidate's key has 64 bits: its score, mapped to an unsigned integer that grows with it (NaN
// as -inf, -0 as +0), then its inverted position. The low half is never stored: candidates stay in
// ascending order of position, so among equal scores the first ones win.
//
// find_bar() finds the worst score to be kept, 11 bits of its key at a time; pass() moves on what
// is as good. Whatever the scores, every candidate is looked at a constant number of times, and
// none is ever dropped for lack of room.
#pragma once

#include "memory.cuh"
#include "ptx/thread.cuh"

namespace hisa::cuda {

// Grows with the score; at least 0x007fffff, the key of -inf.
__device__ __forceinline__ uint32_t to_key(float score) {
  const float ranked = score != score ? -INFINITY : score + 0.0F;
  const uint32_t bits = __float_as_uint(ranked);
  return bits ^ (static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | 0x80000000U);
}

__device__ __forceinline__ float to_score(uint32_t key) {
  return __uint_as_float((key & 0x80000000U) != 0 ? key ^ 0x80000000U : ~key);
}

// Sum over the threads before this one. All threads call it, after a barrier.
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
  for (int w = 0; w < kWarps; ++w) {
    if (w == warp) before += total;
    total += memory.sums[0][w];
  }
  return before;
}

// Two counts of a warp, the second in the high half: those of the warps before this one, and of all
// in `total`. All threads call it, with another `parity` than in the call before if no barrier lies
// between.
__device__ __forceinline__ uint2 sum_of_warps(SharedMemory& memory, int parity, uint32_t mine,
                                              uint2& total) {
  const uint32_t thread = ptx::this_thread();
  const int warp = thread / 32;
  if (thread % 32 == 0) memory.sums[parity][warp] = mine;
  __syncthreads();
  uint2 before{0, 0};
  total = {0, 0};
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    if (w == warp) before = total;
    const uint32_t counts = memory.sums[parity][w];
    total.x += counts & 0xffffU;
    total.y += counts >> 16;
  }
  return before;
}

// Find the bin with the `need`-th highest of the counted keys, into memory.found; the histogram is
// zero again. All threads call it, after a barrier; it ends with one.
__device__ inline void find_bin(SharedMemory& memory, uint32_t need) {
  constexpr int kBins = kHistogram / kThreads;  // per thread; thread 0 has the highest ones
  static_assert(kBins == 16, "four vectors");
  const uint32_t first = (kThreads - 1 - ptx::this_thread()) * kBins;
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

  uint32_t before = sum_before(memory, sum);
  if (before < need && need <= before + sum) {
#pragma unroll
    for (int i = kBins - 1; i >= 0; --i) {
      if (before < need && need <= before + counts[i])
        memory.found = {first + i, before, counts[i]};
      before += counts[i];
    }
  }
  __syncthreads();
}

// Count the digits [low, low + 11) of the keys of scores [n]; behind the first digit, only of keys
// whose higher bits are `prefix`.
template <bool kFirst>
__device__ __forceinline__ void tally(uint32_t* histogram, const float* scores, uint32_t n, int low,
                                      int width, uint32_t prefix) {
  constexpr uint32_t kItems = 8;  // in flight
  const auto count = [&](float score) {
    const uint32_t key = to_key(score);
    if (kFirst || key >> (low + width) == prefix)
      atomicAdd(&histogram[key >> low & ((1U << width) - 1)], 1U);
  };
  uint32_t slab = 0;
#pragma unroll 1
  for (; slab + kItems * kThreads <= n; slab += kItems * kThreads) {
    const float* first = scores + slab + ptx::this_thread();
    float item[kItems];
#pragma unroll
    for (uint32_t j = 0; j < kItems; ++j) item[j] = first[j * kThreads];
#pragma unroll
    for (uint32_t j = 0; j < kItems; ++j) count(item[j]);
  }
#pragma unroll 1
  for (uint32_t i = slab + ptx::this_thread(); i < n; i += kThreads) count(scores[i]);
}

// The bar that exactly the best `count` of scores [n] pass; 1 <= count < n. All threads call it,
// after a barrier.
__device__ __forceinline__ Bar find_bar(SharedMemory& memory, const float* scores, uint32_t n,
                                        uint32_t count) {
  for (int i = ptx::this_thread(); i < kHistogram / 4; i += kThreads)
    reinterpret_cast<uint4*>(histogram(memory))[i] = uint4{0, 0, 0, 0};
  __syncthreads();
  uint32_t prefix = 0;  // the bits of the bar's key that are known
  uint32_t need = count;
#pragma unroll 1
  for (int digit = 0; digit < 3; ++digit) {
    const int low = digit == 0 ? 21 : digit == 1 ? 10 : 0;  // 11 bits, 11 bits, then 10
    const int width = digit == 2 ? 10 : 11;
    if (digit == 0)
      tally<true>(histogram(memory), scores, n, 21, 11, 0);
    else
      tally<false>(histogram(memory), scores, n, low, width, prefix);
    __syncthreads();
    find_bin(memory, need);
    const auto found = memory.found;
    prefix = prefix << width | found.bin;
    need -= found.before;
    if (found.count == need) {
      // All of the bin passes: what is above the key below it. There is one, or all n would pass.
      uint32_t key = (prefix << low) - 1;
      if (key == 0x7fffffffU) --key;  // -0, which no score has as its key
      return {to_score(key), 0};
    }
  }
  return {to_score(prefix), need};
}

// Hand the candidates [0, n) that pass the bar to `write(slot, score, value(i))`, in order, slots
// from 0 on; returns how many. With kInPlace, `write` may overwrite what comes from there, since no
// candidate moves up.
template <bool kTies, bool kInPlace, class Value, class Write>
__device__ __forceinline__ uint32_t move(SharedMemory& memory, const float* scores, uint32_t n,
                                         Bar bar, Value value, Write write) {
  constexpr uint32_t kItems = 16;  // of a thread in a slab: a warp's lie side by side
  const uint32_t lane = ptx::this_thread() % 32;
  const uint32_t earlier = (1U << lane) - 1;
  uint32_t above = 0;  // in the slabs so far
  uint32_t equal = 0;
  int parity = 0;
#pragma unroll 1
  for (uint32_t slab = 0; slab < n; slab += kThreads * kItems, parity ^= 1) {
    const uint32_t first = slab + ptx::this_thread() / 32 * 32 * kItems + lane;
    float score[kItems];
    int32_t values[kItems];
    uint32_t is_above[kItems];  // a bit for each lane
    uint32_t is_equal[kItems];
    uint32_t counts = 0;  // above, and equal in the high half
#pragma unroll
    for (uint32_t j = 0; j < kItems; ++j) {
      const uint32_t i = min(first + j * 32, n - 1);
      score[j] = scores[i];
      if constexpr (kInPlace) values[j] = value(i);
    }
#pragma unroll
    for (uint32_t j = 0; j < kItems; ++j) {
      const bool real = first + j * 32 < n;
      is_above[j] = __ballot_sync(~0U, bar.below(score[j]) && real);
      counts += __popc(is_above[j]);
      if constexpr (kTies) {
        is_equal[j] = __ballot_sync(~0U, bar.equals(score[j]) && real);
        counts += __popc(is_equal[j]) << 16;
      }
    }
    uint2 total;
    const uint2 before = sum_of_warps(memory, parity, counts, total);
    uint32_t ties = equal + before.y;
    uint32_t taken = above + before.x + min(ties, bar.ties);
#pragma unroll
    for (uint32_t j = 0; j < kItems; ++j) {
      uint32_t passing = is_above[j];
      if constexpr (kTies) {
        const bool tie = (is_equal[j] >> lane & 1) != 0;
        passing |= __ballot_sync(~0U, tie && ties + __popc(is_equal[j] & earlier) < bar.ties);
        ties += __popc(is_equal[j]);
      }
      if ((passing >> lane & 1) != 0) {
        const uint32_t slot = taken + __popc(passing & earlier);
        write(slot, score[j], kInPlace ? values[j] : value(first + j * 32));
      }
      taken += __popc(passing);
    }
    above += total.x;
    equal += total.y;
  }
  __syncthreads();
  return above + min(equal, bar.ties);
}

// move(), for any bar. All threads call it, after a barrier; it ends with one.
template <bool kInPlace, class Value, class Write>
__device__ __forceinline__ uint32_t pass(SharedMemory& memory, const float* scores, uint32_t n,
                                         Bar bar, Value value, Write write) {
  return bar.ties > 0 ? move<true, kInPlace>(memory, scores, n, bar, value, write)
                      : move<false, kInPlace>(memory, scores, n, bar, value, write);
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
    bar = find_bar(memory, scores, size, memory.stage.count);
    size = pass<true>(memory, scores, size, bar, [&](uint32_t i) { return values[i]; }, store);
    bar.ties = 0;  // later candidates lose a tie
  }
  const uint32_t base = size;
  size += pass<false>(
      memory, region.scores, n, bar, [&](uint32_t i) { return source.value(begin + i); },
      [&](uint32_t slot, float score, int32_t value) { store(base + slot, score, value); });
  if (ptx::this_thread() == 0) {
    memory.buffered = size;
    memory.bar = bar;
  }
  __syncthreads();
}

// Write the best `count` of a stage, whose candidates are all scored. All threads call it, after a
// barrier; it ends with one.
__device__ __forceinline__ void write_best(SharedMemory& memory) {
  const Region region = memory.region;
  const Stage stage = memory.stage;
  const bool whole = region.holds(stage.source);
  const float* scores = whole ? region.scores : region.buffer_scores();
  const uint32_t size = whole ? stage.source.size : memory.buffered;
  const Bar bar = size > stage.count ? find_bar(memory, scores, size, stage.count) : Bar{};
  const auto write = [&](uint32_t slot, float score, int32_t value) {
    stage.values[slot] = value;
    if (stage.scores != nullptr) stage.scores[slot] = score;
  };
  if (whole)
    pass<false>(
        memory, scores, size, bar, [&](uint32_t i) { return stage.source.value(i); }, write);
  else
    pass<false>(
        memory, scores, size, bar, [&](uint32_t i) { return region.buffer_values()[i]; }, write);
}

}  // namespace hisa::cuda
