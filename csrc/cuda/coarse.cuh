// Stage `coarse`: the row's blocks [first + 1, last), numbered within the segment. The first and
// the last are kept in any case. Only these two can be cut by the window or the segment's end, so
// all others are complete.
#pragma once

#include "memory.cuh"

namespace hisa::cuda {

// What there is to score and to select for a row; into `blocks`, where the first one already is.
__device__ inline Stage coarse_stage(const RowsParams& params, const Row& row, int64_t first,
                                     int64_t last, int32_t* blocks) {
  const int64_t size = int64_t{1} << params.block_shift;
  const int64_t slot = (row.origin + size - 1) >> params.block_shift;  // of the segment's block 0
  Source source = adjacent(params.pooled, slot + first + 1, last - first - 1);
  source.origin = static_cast<int32_t>(slot);
  source.value_shift = params.block_shift;
  source.value_origin = static_cast<int32_t>(row.origin);
  return {.source = source,
          .count = static_cast<uint32_t>(params.block_topk - 2),
          .values = blocks + 1,
          .scores = nullptr,
          .last = false};
}

}  // namespace hisa::cuda
