// What a stage selects: at once, where all of a row's scores are there, or from the buffer, into
// which chunks of scores went one after the other; and the slots that are left over.
#pragma once

#include "select.cuh"

namespace hisa::cuda {

// How many of scores [n] are above the bar. All threads call it, after a barrier; it ends with one.
template <class Team>
__device__ __forceinline__ uint32_t count_above(SharedMemory& memory, const float* scores,
                                                uint32_t n, Bar bar) {
  uint32_t above = 0;
#pragma unroll 4
  for (uint32_t at = Team::thread() * 4; at < n; at += kThreads * 4) {
    const float4 four = *reinterpret_cast<const float4*>(scores + at);
    above += bar.below(four.x);
    above += at + 1 < n && bar.below(four.y);
    above += at + 2 < n && bar.below(four.z);
    above += at + 3 < n && bar.below(four.w);
  }
  above = __reduce_add_sync(~0U, above);
  const uint32_t thread = Team::thread();
  if (thread % 32 == 0) memory.sums[0][thread / 32] = above;
  Team::sync();
  uint32_t total = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) total += memory.sums[0][w];
  Team::sync();
  return total;
}

// Move the chunk of n scores, of positions from `begin` on, into the buffer, as far as it passes
// the bar that the stage's best so far have set. If it does not fit, the buffer is cut to about
// the best `count` first, and the bar rises. All threads call it, after a barrier; it ends with
// one.
template <class Team>
__device__ __forceinline__ void add_to_buffer(SharedMemory& memory, const float* chunk, uint32_t n,
                                              uint32_t begin) {
  const Region region = memory.region;
  float* scores = region.buffer_scores();
  int32_t* positions = region.buffer_positions();
  const auto store = [&](bool passes, uint32_t slot, float score, int32_t position) {
    ptx::store_if(passes, scores + slot, score);
    ptx::store_if(passes, positions + slot, position);
  };
  uint32_t size = memory.buffered;
  Bar bar = memory.bar;
  const uint32_t passing = bar.ties > 0 ? n : count_above<Team>(memory, chunk, n, bar);
  if (passing == 0) return;
  if (size + passing > region.capacity) {
    const uint32_t count = memory.stage.count;
    bar = Team::find_bar(memory, scores, size, count, (region.capacity - passing - count) / 2);
    size = pass<Team, true>(memory, scores, positions, size, bar, store);
    bar.ties = 0;  // later candidates lose a tie
  }
  const uint32_t base = size;
  size += pass<Team, false>(memory, chunk, nullptr, n, bar,
                            [&](bool passes, uint32_t slot, float score, int32_t i) {
                              store(passes, base + slot, score, static_cast<int32_t>(begin) + i);
                            });
  if (Team::thread() == 0) {
    memory.buffered = size;
    memory.bar = bar;
  }
  Team::sync();
}

// The bar that the best `count` of the stage pass.
template <class Team>
__device__ __forceinline__ Bar find_stage_bar(SharedMemory& memory, const float* scores,
                                              uint32_t n) {
  const uint32_t count = memory.stage.count;
  return n > count ? Team::find_bar(memory, scores, n, count) : Bar{};
}

// Move the positions of candidates [0, n) that pass the stage's bar to `positions`, then write what
// they stand for: that takes longer to find out. Given `from`, a position is from[i] instead of i.
template <class Team, bool kFrom>
__device__ __forceinline__ void write_best(SharedMemory& memory, const float* scores,
                                           const int32_t* from, uint32_t n, int32_t* positions) {
  const Stage stage = memory.stage;
  const Bar bar = find_stage_bar<Team>(memory, scores, n);
  const uint32_t found = pass<Team, kFrom>(
      memory, scores, from, n, bar, [&](bool passes, uint32_t slot, float score, int32_t position) {
        ptx::store_if(passes && stage.scores != nullptr, stage.scores + slot, score);
        ptx::store_if(passes, positions + slot, position);
      });
#pragma unroll 4
  for (uint32_t slot = Team::thread(); slot < found; slot += kThreads)
    stage.values[slot] = stage.source.value(static_cast<uint32_t>(positions[slot]));
  Team::sync();
}

// Write the best `count` of a stage, whose candidates' scores are all there, and are overwritten.
// All threads call it, after a barrier; it ends with one.
template <class Team>
__device__ __forceinline__ void write_best_of(SharedMemory& memory, float* scores) {
  write_best<Team, false>(memory, scores, nullptr, memory.stage.source.size,
                          reinterpret_cast<int32_t*>(scores));
}

// Likewise of what is in the buffer.
template <class Team>
__device__ __forceinline__ void write_best_of_buffer(SharedMemory& memory) {
  const Region region = memory.region;
  write_best<Team, true>(memory, region.buffer_scores(), region.buffer_positions(), memory.buffered,
                         region.buffer_positions());
}

// Tokens whose scores nobody needs, since all of them are selected; and -1 in unused slots.
template <class Team>
__device__ __forceinline__ void finish_row(const Output& output, int64_t m, const Stage& stage,
                                           bool scored) {
  int32_t* indices = output.indices + m * output.topk;
  if (!scored)
    for (uint32_t i = Team::thread(); i < stage.count; i += kThreads)
      indices[i] = stage.source.value(i);
  for (int64_t i = stage.count + Team::thread(); i < output.topk; i += kThreads) {
    indices[i] = -1;
    if (output.scores != nullptr) output.scores[m * output.topk + i] = -INFINITY;
  }
}

}  // namespace hisa::cuda
