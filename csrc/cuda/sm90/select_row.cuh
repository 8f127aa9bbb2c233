// What a stage selects, of candidates that are Held or Stored.
#pragma once

#include "candidates.cuh"

namespace hisa::cuda::sm90 {

// write(passes, slot, j) for each of four candidates.
template <class Write>
__device__ __forceinline__ void for_four(uint32_t bits, uint32_t slot, Write write) {
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const bool passes = (bits >> j & 1) != 0;
    write(passes, slot, j);
    slot += passes;
  }
}

// Write the best `count` of a stage: of scores [n], of the given positions or, without, of all. The
// scores are overwritten. All threads call it, after a barrier; it ends with one.
template <class Team, class Scores>
__device__ __forceinline__ void write_best(Counts& counts, const Stage& stage, float* scores,
                                           int32_t* positions, uint32_t n) {
  pad<Team>(scores, positions, n);
  Scores all(scores, n);
  const uint32_t found =
      all.pass(counts, find_cut<Team>(counts, all, {scores, n}, n, stage.count, 0));
  if (stage.scores != nullptr)
    all.for_slabs(counts, [&](uint32_t, const float (&score)[4], uint32_t bits, uint32_t first) {
      for_four(bits, first, [&](bool passes, uint32_t slot, int j) {
        if (passes) stage.scores[slot] = score[j];
      });
    });
  Team::sync();
  // First in place of the scores, so that adjacent threads write adjacent values. Four adjacent
  // candidates stand for adjacent values if blocks begin at multiples of four of them; else it is
  // their positions that are gathered, and what they stand for is looked up later.
  auto* values = reinterpret_cast<int32_t*>(scores);
  const Source& source = stage.source;
  const bool late = positions != nullptr || source.first % 4 != 0;
  const int step = late ? 0 : source.value_shift;
  all.for_slabs(counts, [&](uint32_t at, const float (&)[4], uint32_t bits, uint32_t first) {
    int32_t value = static_cast<int32_t>(at);
    if (!late && at < n) value = source.value(at);
    int4 four{value, value + (1 << step), value + (2 << step), value + (3 << step)};
    if (positions != nullptr && at < n) four = *reinterpret_cast<const int4*>(positions + at);
    const int32_t of[4] = {four.x, four.y, four.z, four.w};
    for_four(bits, first, [&](bool passes, uint32_t slot, int j) {
      ptx::store_if(passes, values + slot, of[j]);
    });
  });
  Team::sync();
#pragma unroll 4
  for (uint32_t slot = Team::thread(); slot < found; slot += kThreads)
    stage.values[slot] = late ? source.value(static_cast<uint32_t>(values[slot])) : values[slot];
  Team::sync();
}

// What is still in the running of a row that does not fit into a chunk, in order of position.
struct RowBuffer {
  float* scores;  // [capacity]
  int32_t* positions;
  uint32_t capacity;
  uint32_t size;
  Bar bar;  // that later candidates have to pass
};

// Cut the buffer to the best `count`, or up to `slack` more. It ends with a barrier.
template <class Team, class Scores>
__device__ __forceinline__ void cut_buffer(Counts& counts, RowBuffer& buffer, uint32_t count,
                                           uint32_t slack) {
  float* scores = buffer.scores;
  int32_t* positions = buffer.positions;
  const uint32_t size = buffer.size;
  pad<Team>(scores, positions, size);
  Scores all(scores, size);
  const Cut cut = find_cut<Team>(counts, all, {scores, size}, size, count, slack);
  const uint32_t left = all.pass(counts, cut);
  all.for_slabs(counts, [&](uint32_t at, const float (&score)[4], uint32_t bits, uint32_t first) {
    int4 four{};
    if (at < size) four = *reinterpret_cast<const int4*>(positions + at);
    Team::sync();  // nothing moves up, so what was not read yet is safe
    const int32_t position[4] = {four.x, four.y, four.z, four.w};
    for_four(bits, first, [&](bool passes, uint32_t slot, int j) {
      ptx::store_if(passes, scores + slot, score[j]);
      ptx::store_if(passes, positions + slot, position[j]);
    });
  });
  if (Team::thread() == 0) {
    buffer.size = left;
    buffer.bar = {cut.bar.score, 0};  // later candidates lose a tie
  }
  Team::sync();
}

// Move the chunk of n scores, of positions from `begin` on, into the buffer, as far as it passes
// the bar that the row's best so far have set. If it does not fit, the buffer is cut to about the
// best `count` first, and the bar rises. All threads call it, after a barrier; it ends with one.
template <class Team, class Chunk, class Scores>
__device__ __forceinline__ void add_to_buffer(Counts& counts, RowBuffer& buffer, uint32_t count,
                                              float* chunk, uint32_t n, uint32_t begin) {
  pad<Team>(chunk, nullptr, n);
#pragma unroll 1
  while (true) {
    Chunk all(chunk, n);
    const Bar bar = buffer.bar;
    const uint32_t size = buffer.size;
    const uint32_t passing = all.pass(counts, {bar, bar.ties > 0 ? n : 0});
    if (size + passing <= buffer.capacity) {
      float* scores = buffer.scores + size;
      int32_t* positions = buffer.positions + size;
      all.for_slabs(
          counts, [&](uint32_t at, const float (&score)[4], uint32_t bits, uint32_t first) {
            for_four(bits, first, [&](bool passes, uint32_t slot, int j) {
              ptx::store_if(passes, scores + slot, score[j]);
              ptx::store_if(passes, positions + slot, static_cast<int32_t>(begin + at + j));
            });
          });
      Team::sync();
      if (Team::thread() == 0) buffer.size = size + passing;
      Team::sync();
      return;
    }
    Team::sync();
    cut_buffer<Team, Scores>(counts, buffer, count, (buffer.capacity - passing - count) / 2);
  }
}

}  // namespace hisa::cuda::sm90
