// The warpgroup that selects, where all scores of a row lie in a chunk.
#pragma once

#include "shared.cuh"

namespace hisa::cuda::sm90 {

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

// What is left to do for the rows of a group.
template <class C>
__device__ __forceinline__ void finish_rows(const Params& params, const Group<C>& group) {
#pragma unroll 1
  for (int row = 0; row < C::kGroup; ++row) {
    const int64_t m = group.m + row;
    if (m >= params.rows.queries.rows) return;
    if (params.work == Work::kCoarse)
      list_forced_blocks(params, group.rows[row], m, selector(), kSelectors);
    else
      finish_row<kSelectors>(params.rows.output, m, group.rows[row].stage, group.rows[row].scored);
  }
}

template <class C>
class Selector {
 public:
  __device__ Selector(const Params& params, const Memory<C>& memory)
      : params_(params), memory_(memory) {}

  __device__ __forceinline__ void run() const {
    Shared<C>& shared = memory_.shared;
    Turn group_turn{params_.groups};
    Turn chunk_turn{params_.chunks};
    for (int64_t g = last_group<C>(params_); g >= 0; g -= gridDim.x, group_turn.next()) {
      shared.group_full[group_turn.buffer].wait(group_turn.phase);
      const Group<C>& group = shared.groups[group_turn.buffer];
      if (group.size > 0) {
        const auto release = [&] { shared.chunk_empty[chunk_turn.buffer].arrive(); };
#pragma unroll 1
        for (int row = 0; row < C::kGroup; ++row) {
          if (C::kTight || row == 0) shared.chunk_full[chunk_turn.buffer].wait(chunk_turn.phase);
          float* const scores = memory_.chunk(chunk_turn.buffer, row, params_.rows.chunk);
          if constexpr (C::kTight) {
            if (group.rows[row].scored)
              write(group.rows[row].stage, scores, memory_.chosen, release);
            else
              release();
            chunk_turn.next();
          } else if (group.rows[row].scored) {
            write(group.rows[row].stage, scores, nullptr, [] {});
          }
        }
        if constexpr (!C::kTight) {
          release();
          chunk_turn.next();
        }
      }
      finish_rows(params_, group);
      sync_selectors();
      shared.group_empty[group_turn.buffer].arrive();
    }
  }

 private:
  template <class Release>
  __device__ __forceinline__ void write(const Stage& stage, float* scores, int32_t* chosen,
                                        Release release) const {
    using Few = Held<4>;
    using Many = Held<16>;
    using Any = Stored;
    static_assert(kPairTiles * 64 <= Many::kMost);
    Counts& counts = memory_.shared.counts;
    const uint32_t n = stage.source.size;
    if (n <= Few::kMost)
      write_best<Few>(counts, stage, scores, nullptr, n, NAN, chosen, release);
    else if (C::kPairs || n <= Many::kMost)
      write_best<Many>(counts, stage, scores, nullptr, n, NAN, chosen, release);
    else
      write_best<Any>(counts, stage, scores, nullptr, n, NAN, chosen, release);
  }

  const Params& params_;
  const Memory<C>& memory_;
};

}  // namespace hisa::cuda::sm90
