// What both kernels of split.cuh know of a row and a stage.
#pragma once

#include "coarse.cuh"
#include "extent.cuh"
#include "refine.cuh"
#include "split.h"

namespace hisa::cuda {

// Take up row m, by one thread: where its scores and its list of blocks lie, and what there is to
// score and to select, if anything. A row that keeps all of its blocks is one without blocks.
__device__ inline void begin_stage(const SplitStage& stage, SharedMemory& memory, int64_t m,
                                   const Extent& extent) {
  const RowsParams& call = stage.call;
  char* row = call.workspace + m * row_bytes(call.chunk, call.capacity, call.kept);
  memory.region = {.scores = reinterpret_cast<float*>(row),
                   .size = region_size(call.chunk, call.capacity),
                   .chunk = static_cast<uint32_t>(call.chunk),
                   .capacity = static_cast<uint32_t>(call.capacity)};
  int32_t* blocks = memory.region.blocks();
  memory.m = m;
  memory.stage = Stage{.last = !stage.coarse};
  if (stage.coarse) {
    if (extent.pruned && extent.kept > 2)
      memory.stage = coarse_stage(call, extent.row, extent.first, extent.last, blocks);
  } else if (!extent.row.empty()) {
    memory.stage = token_stage(call, m, extent.row, extent.pruned ? extent.kept : 0, blocks);
  }
  memory.scored = memory.stage.scores != nullptr || memory.stage.count < memory.stage.source.size;
}

}  // namespace hisa::cuda
