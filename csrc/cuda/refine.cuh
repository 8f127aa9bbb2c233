// Stages `refine` and `flat`: the window's tokens, those of the kept blocks or, if there are none,
// all.
#pragma once

#include "memory.cuh"

namespace hisa::cuda {

// What there is to score and to select for row m.
__device__ inline Stage token_stage(const RowsParams& params, int64_t m, const Row& row,
                                    uint32_t kept, const int32_t* blocks) {
  const Output& output = params.output;
  Source source = adjacent(params.keys, row.start, row.end - row.start);
  if (kept > 0) {  // no block but the first and the last is cut, so positions have no gaps
    const int64_t whole = int64_t{kept - 1} << params.block_shift;
    source.blocks = blocks;
    source.block_shift = params.block_shift;
    source.first = static_cast<uint32_t>(row.start - blocks[0]);
    source.size = static_cast<uint32_t>(whole + row.end - blocks[kept - 1]) - source.first;
  }
  return {.source = source,
          .count = static_cast<uint32_t>(min(output.topk, int64_t{source.size})),
          .values = output.indices + m * output.topk,
          .scores = output.scores == nullptr ? nullptr : output.scores + m * output.topk,
          .last = true};
}

}  // namespace hisa::cuda
