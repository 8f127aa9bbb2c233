// Selects blocks where no row has more than a warp can hold: a warp for each row, so that several
// rows are selected at a time.
#pragma once

#include "select.cuh"
#include "select_warp.cuh"

namespace hisa::cuda::sm90 {

inline constexpr int kFew = kFewBlocks / 32;  // candidates of a lane

// Whether that is so for all rows of the call.
__device__ __forceinline__ bool have_few(const Params& params) {
  return params.work == Work::kCoarse && params.scored.count <= min(kFewBlocks, params.rows.chunk);
}

template <class C>
class WarpSelector {
 public:
  __device__ WarpSelector(const Params& params, const Memory<C>& memory)
      : params_(params), memory_(memory) {}

  __device__ void run() const {
    Shared<C>& shared = memory_.shared;
    const uint32_t warp = ptx::this_thread() / 32;
    Turn group_turn{params_.groups};
    Turn chunk_turn{params_.chunks};
    uint32_t turn = 0;  // whose the row is
    for (int64_t g = last_group<C>(params_); g >= 0; g -= gridDim.x, group_turn.next()) {
      shared.group_full[group_turn.buffer].wait(group_turn.phase);
      const Group<C>& group = shared.groups[group_turn.buffer];
      const bool scored = group.size > 0;
      if (scored) shared.chunk_full[chunk_turn.buffer].wait(chunk_turn.phase);
#pragma unroll 1
      for (int row = 0; row < C::kGroup; ++row, ++turn)
        if (turn % kSelectorWarps == warp && group.m + row < params_.rows.queries.rows)
          take(group.rows[row], group.m + row,
               memory_.chunk(chunk_turn.buffer, row, params_.rows.chunk));
      if (scored) {
        shared.chunk_empty[chunk_turn.buffer].arrive();
        chunk_turn.next();
      }
      shared.group_empty[group_turn.buffer].arrive();
    }
  }

 private:
  __device__ void take(const GroupRow& row, int64_t m, const float* scores) const {
    if (row.scored && row.stage.source.size <= 16 * kFew)
      write_best_by_warp<kFew / 2>(row.stage, scores);
    else if (row.scored)
      write_best_by_warp<kFew>(row.stage, scores);
    list_forced_blocks(params_, row, m, ptx::this_thread() % 32, 32);
  }

  const Params& params_;
  const Memory<C>& memory_;
};

}  // namespace hisa::cuda::sm90
