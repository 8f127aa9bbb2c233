// The warpgroup that selects: from chunks, a row at a time.
#pragma once

#include "shared.cuh"

namespace hisa::cuda::sm90 {

struct SelectorTeam {
  __device__ static uint32_t thread() { return ptx::this_thread(); }
  __device__ static void sync() { ptx::sync_warpgroup(); }
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
      : params_(params), shared_(memory.shared), chunks_(memory.chunks) {
    const int64_t capacity = params.rows.capacity;
    if (SelectorTeam::thread() < C::kGroup) {
      RowBuffer& buffer = shared_.buffers[SelectorTeam::thread()];
      buffer.scores = memory.buffers + SelectorTeam::thread() * 2 * capacity;
      buffer.positions = reinterpret_cast<int32_t*>(buffer.scores + capacity);
      buffer.capacity = static_cast<uint32_t>(capacity);
    }
  }

  __device__ void run() {
    const auto chunk = static_cast<uint32_t>(params_.rows.chunk);
    Turn group_turn{params_.groups};
    Turn chunk_turn{kChunks};
    for (int64_t g = last_group<C>(params_); g >= 0; g -= gridDim.x, group_turn.next()) {
      shared_.group_full[group_turn.buffer].wait(group_turn.phase);
      const Group<C>& group = shared_.groups[group_turn.buffer];
      if (SelectorTeam::thread() < C::kGroup) {
        RowBuffer& buffer = shared_.buffers[SelectorTeam::thread()];
        buffer.size = 0;
        buffer.bar = {};
      }
      SelectorTeam::sync();
      for (uint32_t begin = 0; begin < group.size; begin += chunk, chunk_turn.next()) {
        shared_.chunk_full[chunk_turn.buffer].wait(chunk_turn.phase);
#pragma unroll 1
        for (int row = 0; row < C::kGroup; ++row)
          if (group.rows[row].scored)
            take(group.rows[row], shared_.buffers[row], begin,
                 chunks_ + (chunk_turn.buffer * C::kGroup + row) * params_.rows.chunk, group.size);
        shared_.chunk_empty[chunk_turn.buffer].arrive();
      }
#pragma unroll 1
      for (int row = 0; row < C::kGroup; ++row)
        if (group.m + row < params_.rows.queries.rows) finish(group.rows[row], group.m + row);
      SelectorTeam::sync();
      shared_.group_empty[group_turn.buffer].arrive();
    }
  }

 private:
  using Few = Held<SelectorTeam, 4>;
  using Several = Held<SelectorTeam, 12>;
  using Many = Held<SelectorTeam, 16>;
  using Any = Stored<SelectorTeam>;

  // Take up the scores of a row that are in the chunk which begins at key `begin` of the group's
  // `size`.
  __device__ void take(const GroupRow& row, RowBuffer& buffer, uint32_t begin, float* scores,
                       uint32_t size) {
    const auto chunk = static_cast<uint32_t>(params_.rows.chunk);
    const uint32_t all = row.stage.source.size;
    const bool whole = size <= chunk;
    if (!whole) {
      const uint32_t from = begin > row.shift ? begin - row.shift : 0;  // positions
      const uint32_t end = begin + chunk > row.shift ? min(all, begin + chunk - row.shift) : 0;
      if (from < end) add(row.stage, buffer, scores, end - from, from);
      if (begin + chunk < size) return;
    }
    write(row.stage, whole ? scores : buffer.scores, whole ? nullptr : buffer.positions,
          whole ? all : buffer.size);
  }

  __device__ void add(const Stage& stage, RowBuffer& buffer, float* chunk, uint32_t n,
                      uint32_t begin) {
    if (buffer.capacity <= Several::kMost)
      add_to_buffer<SelectorTeam, Few, Several>(shared_.counts, buffer, stage.count, chunk, n,
                                                begin);
    else
      add_to_buffer<SelectorTeam, Few, Any>(shared_.counts, buffer, stage.count, chunk, n, begin);
  }

  // Write the row's best of n candidates.
  __device__ void write(const Stage& stage, float* scores, int32_t* positions, uint32_t n) {
    if (n <= Few::kMost)
      write_best<SelectorTeam, Few>(shared_.counts, stage, scores, positions, n);
    else if (n <= Many::kMost)
      write_best<SelectorTeam, Many>(shared_.counts, stage, scores, positions, n);
    else
      write_best<SelectorTeam, Any>(shared_.counts, stage, scores, positions, n);
  }

  __device__ void finish(const GroupRow& row, int64_t m) const {
    if (params_.work == Work::kCoarse)
      list_forced_blocks(params_, row, m, SelectorTeam::thread(), kThreads);
    else
      finish_row(params_.rows.output, m, row.stage, row.scored);
  }

  const Params& params_;
  Shared<C>& shared_;
  float* chunks_;  // [kChunks, kGroup, chunk]
};

}  // namespace hisa::cuda::sm90
