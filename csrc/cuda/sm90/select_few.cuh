// Selects blocks where no row has more than a warp can hold: a warp for each row, so that several
// rows are selected at a time.
#pragma once

#include "select.cuh"

namespace hisa::cuda::sm90 {

// The bar that exactly the best `count` of n candidates pass, 1 <= count < n. A lane has
// candidates i * 32 + lane; NaN behind the last.
template <int kScores>
__device__ __forceinline__ Bar find_bar_by_warp(const float (&scores)[kScores], uint32_t n,
                                                uint32_t count) {
  float sum = 0.0F;
  float squares = 0.0F;
#pragma unroll
  for (uint32_t i = 0; i < kScores; ++i)
    if (i < n / 32) sum += scores[i], squares = fmaf(scores[i], scores[i], squares);
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) {
    sum += __shfl_xor_sync(~0U, sum, mask);
    squares += __shfl_xor_sync(~0U, squares, mask);
  }
  Search search(n, count, 0, make_spread(sum, squares, n / 32 * 32));
#pragma unroll 1
  while (!search.found()) {
    const uint32_t key = search.guess();
    const float bar = pass_from(key).score;
    float above = 0.0F;  // takes an instruction less than an integer
#pragma unroll
    for (int i = 0; i < kScores; ++i) above += scores[i] > bar ? 1.0F : 0.0F;
    search.narrow(key, __reduce_add_sync(~0U, static_cast<uint32_t>(above)));
  }
  return search.bar();
}

// Write the best of a stage of adjacent keys, of which 1 <= count < source.size; not their scores.
// All lanes of the warp call it.
template <int kScores>
__device__ __forceinline__ void write_best_by_warp(const Stage& stage, const float* from) {
  const uint32_t lane = threadIdx.x % 32;
  const uint32_t n = stage.source.size;
  float scores[kScores];
#pragma unroll
  for (int i = 0; i < kScores; ++i) {
    const uint32_t at = i * 32 + lane;
    scores[i] = at < n ? from[at] : NAN;
  }
  const Bar bar = find_bar_by_warp(scores, n, stage.count);
  // What candidate 0 stands for, and the next ones: not looked up one by one.
  const int32_t value = stage.source.value(0);
  const int shift = stage.source.value_shift;
  int32_t* values = stage.values;
  const uint32_t before = (1U << lane) - 1;
  uint32_t slot = 0;
  uint32_t ties = bar.ties;  // that still pass
#pragma unroll
  for (int i = 0; i < kScores; ++i) {
    const uint32_t at = i * 32 + lane;
    bool passes = bar.below(scores[i]);
    if (bar.ties > 0) {
      const bool equal = at < n && bar.equals(scores[i]);
      const uint32_t all = __ballot_sync(~0U, equal);
      passes = passes || (equal && static_cast<uint32_t>(__popc(all & before)) < ties);
      ties -= min(ties, static_cast<uint32_t>(__popc(all)));
    }
    const uint32_t passing = __ballot_sync(~0U, passes);
    if (passes)
      values[slot + static_cast<uint32_t>(__popc(passing & before))] =
          value + static_cast<int32_t>(at << shift);
    slot += static_cast<uint32_t>(__popc(passing));
  }
}

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
