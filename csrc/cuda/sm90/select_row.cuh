// What a stage selects, of candidates that are Held or Stored.
#pragma once

#include "candidates.cuh"

namespace hisa::cuda::sm90 {

// Write what the chosen candidates stand for, in batches, so that loads overlap; those are
// numbered by position or, if it is not null, lie at the given ones.
__device__ __forceinline__ void write_values(const Stage& stage, const int32_t* chosen,
                                             const int32_t* positions, uint32_t number) {
  constexpr int kBatch = 8;
#pragma unroll 1
  for (uint32_t begin = selector(); begin < number; begin += kBatch * kSelectors) {
    int32_t values[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const uint32_t slot = min(begin + i * kSelectors, number - 1);
      values[i] = positions == nullptr ? chosen[slot] : positions[chosen[slot]];
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i)
      values[i] = stage.source.value(static_cast<uint32_t>(values[i]));
#pragma unroll
    for (int i = 0; i < kBatch; ++i)
      if (begin + i * kSelectors < number) stage.values[begin + i * kSelectors] = values[i];
  }
}

// Write the best `count` of a stage: of scores [n], of the given positions or, without, of all.
// Their numbers are first written to `chosen`, in place of the scores if it is null; otherwise the
// scores are not needed any more when each warp calls `release`, if they are Held. All threads call
// it, after a barrier; it ends with one.
template <class Scores, class Release>
__device__ __forceinline__ void write_best(Counts& counts, const Stage& stage, float* scores,
                                           const int32_t* positions, uint32_t n, float passed,
                                           int32_t* chosen, Release release) {
  pad(scores, nullptr, n);
  Scores all(typename Scores::template Array<float>(scores), n);
  const Stored stored(AnyArray<float>(scores), n);
  const Cut cut = find_cut(counts, all, stored, n, stage.count, 0, passed);
  release();
  const uint32_t found = all.pass(counts, cut);
  sync_selectors();
  if (stage.scores != nullptr) {
    all.for_slabs(counts, Nothing{},
                  [&](int, uint32_t, const float (&score)[4], uint32_t bits, uint32_t first) {
                    AnyArray<float>(stage.scores + first).push_4(bits, score);
                  });
    sync_selectors();  // Stored counts again
  }
  // First their numbers, so that adjacent threads write adjacent values.
  if (chosen == nullptr) chosen = reinterpret_cast<int32_t*>(scores);
  const typename Scores::template Array<int32_t> numbers(chosen);
  all.for_slabs(counts, Nothing{},
                [&](int, uint32_t at, const float (&)[4], uint32_t bits, uint32_t first) {
                  const auto i = static_cast<int32_t>(at);
                  const int32_t four[4] = {i, i + 1, i + 2, i + 3};
                  auto to = numbers;
                  to.skip(first);
                  to.push_4(bits, four);
                });
  sync_selectors();
  write_values(stage, chosen, positions, found);
  sync_selectors();
}

// What is still in the running of a row that does not fit into a chunk, in order of position.
struct RowBuffer {
  float* scores;  // [capacity]
  int32_t* positions;
  uint32_t capacity;
  uint32_t size;
  Bar bar;  // that later candidates have to pass

  __device__ bool has_bar() const { return bar.ties == 0; }
  __device__ float passed() const { return has_bar() ? bar.score : NAN; }
};

// Cut the buffer to the best `count`, or up to `slack` more. It ends with a barrier.
template <class Scores>
__device__ __forceinline__ void cut_buffer(Counts& counts, RowBuffer& buffer, uint32_t count,
                                           uint32_t slack) {
  using Floats = typename Scores::template Array<float>;
  using Positions = typename Scores::template Array<int32_t>;
  const uint32_t size = buffer.size;
  pad(buffer.scores, buffer.positions, size);
  const Floats scores(buffer.scores);
  const Positions positions(buffer.positions);
  Scores all(scores, size);
  const Stored stored(AnyArray<float>(buffer.scores), size);
  const Cut cut = find_cut(counts, all, stored, size, count, slack, buffer.passed());
  const uint32_t left = all.pass(counts, cut);
  int32_t position[4][4];
  // Nothing moves up, so what was not read yet is safe.
  const auto load = [&](int i, uint32_t at) {
    if (at < size) positions.load_4(at, position[i]);
  };
  const auto move = [&](int i, uint32_t, const float (&score)[4], uint32_t bits, uint32_t first) {
    Floats to_scores = scores;
    Positions to_positions = positions;
    to_scores.skip(first);
    to_positions.skip(first);
    to_scores.push_4(bits, score);
    to_positions.push_4(bits, position[i]);
  };
  all.for_slabs(counts, load, move);
  if (selector() == 0) {
    buffer.size = left;
    buffer.bar = {cut.bar.score, 0};  // later candidates lose a tie
  }
  sync_selectors();
}

// Scores of a chunk of a row, in shared memory: of positions from `begin` on.
struct Chunk {
  const float* scores;
  uint32_t n;
  int32_t begin;
};

// Move all of a chunk to a buffer that has no bar yet, and room for it. All threads call this and
// the next two, after a barrier; they end with one.
__device__ __forceinline__ void add_all(RowBuffer& buffer, const Chunk& chunk) {
  const uint32_t size = buffer.size;
  const auto position = [&](uint32_t i) { return chunk.begin + static_cast<int32_t>(i); };
  if (size % 4 == 0) {  // what lies behind the last is written over
#pragma unroll 4
    for (uint32_t i = selector() * 4; i < chunk.n; i += kSlab) {
      *reinterpret_cast<float4*>(buffer.scores + size + i) =
          *reinterpret_cast<const float4*>(chunk.scores + i);
      *reinterpret_cast<int4*>(buffer.positions + size + i) = {position(i), position(i + 1),
                                                               position(i + 2), position(i + 3)};
    }
  } else {
#pragma unroll 1
    for (uint32_t i = selector(); i < chunk.n; i += kSelectors) {
      buffer.scores[size + i] = chunk.scores[i];
      buffer.positions[size + i] = position(i);
    }
  }
  sync_selectors();
  if (selector() == 0) buffer.size = size + chunk.n;
  sync_selectors();
}

// Move those candidates of a chunk that are marked: a bit for each of the 16 of this thread, from
// `first` on. False, and nothing done, if there is no room for all, `passing`.
__device__ __forceinline__ bool add_marked(Counts& counts, RowBuffer& buffer, const Chunk& chunk,
                                           uint32_t first, uint32_t marks, uint32_t& passing) {
  const uint32_t size = buffer.size;
  uint32_t slot = size + sum_before(counts, 0, static_cast<uint32_t>(__popc(marks)), passing);
  const bool fits = size + passing <= buffer.capacity;
  if (fits) {
    const ptx::SharedArray<float> scores(chunk.scores + first);
    for (; marks != 0; marks &= marks - 1, ++slot) {
      const auto i = static_cast<uint32_t>(__ffs(static_cast<int>(marks)) - 1);
      buffer.scores[slot] = scores.load(i);
      buffer.positions[slot] = chunk.begin + static_cast<int32_t>(first + i);
    }
    if (selector() == 0) buffer.size = size + passing;
  }
  sync_selectors();
  return fits;
}

// Likewise those of up to 2048 candidates that are above the buffer's bar.
__device__ __forceinline__ bool add_above(Counts& counts, RowBuffer& buffer, const Chunk& chunk,
                                          uint32_t& passing) {
  constexpr int kOwn = kMostChunk / kSelectors;
  const uint32_t size = buffer.size;
  const float bar = buffer.bar.score;
  const uint32_t lane = selector() % 32;
  const uint32_t first = selector() / 32 * (32 * kOwn) + lane;
  const ptx::SharedArray<float> scores(chunk.scores);
  float score[kOwn];
  uint32_t above[kOwn];  // of 32 adjacent candidates
  uint32_t mine = 0;     // of the warp
#pragma unroll
  for (int i = 0; i < kOwn; ++i)
    score[i] = first + i * 32 < chunk.n ? scores.load(first + i * 32) : NAN;
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    above[i] = __ballot_sync(~0U, score[i] > bar);
    mine += static_cast<uint32_t>(__popc(above[i]));
  }
  uint32_t slot = size + sum_before(counts, 0, lane == 0 ? mine : 0, passing);
  slot = __shfl_sync(~0U, slot, 0);  // of the warp's first one
  const bool fits = size + passing <= buffer.capacity;
  if (fits) {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      if (score[i] > bar) {
        const auto at = slot + static_cast<uint32_t>(__popc(above[i] & ((1U << lane) - 1)));
        buffer.scores[at] = score[i];
        buffer.positions[at] = chunk.begin + static_cast<int32_t>(first + i * 32);
      }
      slot += static_cast<uint32_t>(__popc(above[i]));
    }
    if (selector() == 0) buffer.size = size + passing;
  }
  sync_selectors();
  return fits;
}

}  // namespace hisa::cuda::sm90
