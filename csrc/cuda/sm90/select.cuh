// The warpgroup that selects, with the code that the portable kernel has for it (../select*.cuh).
#pragma once

#include "../select_stage.cuh"
#include "bar.cuh"
#include "shared.cuh"

namespace hisa::cuda::sm90 {

struct SelectorTeam {
  __device__ static uint32_t thread() { return ptx::this_thread(); }
  __device__ static void sync() { ptx::sync_warpgroup(); }
  __device__ static Bar find_bar(SharedMemory& memory, const float* scores, uint32_t n,
                                 uint32_t count, uint32_t slack = 0) {
    return n < kFewScores ? find_bar_by_digits<SelectorTeam>(memory, scores, n, count, slack)
                          : find_bar_by_range<SelectorTeam>(memory, scores, n, count);
  }
  static constexpr uint32_t kFewScores = 512;
};

// Of the blocks that a row keeps, those that need no score: the first and the last, or all.
__device__ __forceinline__ void list_forced_blocks(const Params& params, const GroupRow& row,
                                                   int64_t m, uint32_t thread, uint32_t threads) {
  const RowsParams& rows = params.rows;
  int32_t* blocks = params.kept + m * rows.kept;
  for (uint32_t i = thread; i < row.kept; i += threads) {
    if (!row.pruned || i == 0) blocks[i] = row.first + static_cast<int32_t>(i << rows.block_shift);
    if (row.pruned && i == row.kept - 1) blocks[i] = row.last;
  }
}

template <class C>
class Selector {
 public:
  __device__ Selector(const Params& params, const Memory<C>& memory)
      : params_(params), memory_(memory), select_(memory.shared.select) {
    for (uint32_t i = SelectorTeam::thread(); i < kHistogram; i += kThreads)
      histogram(select_)[i] = 0;
    SelectorTeam::sync();
  }

  __device__ void run() {
    Shared<C>& shared = memory_.shared;
    const auto chunk = static_cast<uint32_t>(params_.rows.chunk);
    Turn group_turn{params_.groups};
    Turn chunk_turn{kChunks};
    for (int64_t g = last_group<C>(params_); g >= 0; g -= gridDim.x, group_turn.next()) {
      shared.group_full[group_turn.buffer].wait(group_turn.phase);
      const Group<C>& group = shared.groups[group_turn.buffer];
      for (int row = 0; row < C::kGroup; ++row)
        if (SelectorTeam::thread() == 0) shared.states[row] = {};
      for (uint32_t begin = 0; begin < group.size; begin += chunk, chunk_turn.next()) {
        shared.chunk_full[chunk_turn.buffer].wait(chunk_turn.phase);
#pragma unroll 1
        for (int row = 0; row < C::kGroup; ++row)
          take(group.rows[row], row, begin,
               memory_.chunk(chunk_turn.buffer, row, params_.rows.chunk), group.size);
        shared.chunk_empty[chunk_turn.buffer].arrive();
      }
#pragma unroll 1
      for (int row = 0; row < C::kGroup; ++row)
        if (group.m + row < params_.rows.queries.rows) finish(group.rows[row], group.m + row);
      SelectorTeam::sync();
      shared.group_empty[group_turn.buffer].arrive();
    }
  }

 private:
  // Take up the scores of a row that are in the chunk which begins at the group's key `begin`.
  __device__ void take(const GroupRow& row, int number, uint32_t begin, float* scores,
                       uint32_t size) {
    if (!row.scored) return;
    const auto chunk = static_cast<uint32_t>(params_.rows.chunk);
    const uint32_t all = row.stage.source.size;
    const uint32_t from = begin > row.shift ? begin - row.shift : 0;  // positions
    const uint32_t end = begin + chunk > row.shift ? min(all, begin + chunk - row.shift) : 0;
    const bool last = begin + chunk >= size;
    if (from >= end && !last) return;
    RowState& state = memory_.shared.states[number];
    if (SelectorTeam::thread() == 0) {
      // The chunk is elsewhere: see Region::buffer_scores().
      select_.region = {
          .scores = memory_.buffers + number * 2 * params_.rows.capacity - chunk - kBehind,
          .size = chunk,
          .chunk = chunk,
          .capacity = static_cast<uint32_t>(params_.rows.capacity)};
      select_.stage = row.stage;
      select_.buffered = state.buffered;
      select_.bar = state.bar;
    }
    SelectorTeam::sync();
    if (size <= chunk) {
      write_best_of<SelectorTeam>(select_, scores);
    } else {
      if (from < end) add_to_buffer<SelectorTeam>(select_, scores, end - from, from);
      if (SelectorTeam::thread() == 0) state = {select_.buffered, select_.bar};
      if (last) write_best_of_buffer<SelectorTeam>(select_);
    }
    SelectorTeam::sync();
  }

  __device__ void finish(const GroupRow& row, int64_t m) const {
    if (params_.work == Work::kCoarse)
      list_forced_blocks(params_, row, m, SelectorTeam::thread(), kThreads);
    else
      finish_row<SelectorTeam>(params_.rows.output, m, row.stage, row.scored);
  }

  const Params& params_;
  const Memory<C>& memory_;
  SharedMemory& select_;
};

}  // namespace hisa::cuda::sm90
