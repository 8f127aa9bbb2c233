// Few rows, each scored by several blocks of threads: see split.cuh.
#pragma once

#include <cuda_runtime_api.h>

#include "launch.h"

namespace hisa::cuda {

// Positions of a part are a multiple of it: a tile, or several, for each warp.
inline constexpr uint32_t kPartStep = kWarps * kBehind;

// One stage of a call.
struct SplitStage {
  RowsParams call;
  bool coarse;     // which one it is
  uint32_t parts;  // of a row; each is scored by a block of threads
};

// The scores of a stage into the workspace. One translation unit each: split_fp8.cu, ...
template <ElementType kType>
cudaError_t launch_scores_of(const SplitStage& stage, const Geometry& geometry,
                             cudaStream_t stream);
// What it selects, into the workspace or the result.
cudaError_t launch_select(const SplitStage& stage, cudaStream_t stream);

}  // namespace hisa::cuda
