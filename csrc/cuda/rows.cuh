// The kernel of stages `coarse`, `refine` and `flat`: one row per block of threads.
//
//   coarse   (coarse.cuh) score the pooled keys of complete inner blocks, select block_topk - 2
//   refine   (refine.cuh) score the tokens of the kept blocks, select topk
//   flat     (refine.cuh) score the tokens of the window, select topk
//
// All three score and select from a Source of their own by the same code, so a token's score is the
// same bits in each. A row's scores, candidates and blocks stay on chip unless topk is very large;
// only its result is written. Cost of a row: (N / B + block_topk * B) * H * D multiply-adds, and
// N / B + block_topk * B keys read from L2.
#pragma once

#include <utility>

#include "coarse.cuh"
#include "extent.cuh"
#include "launch.cuh"
#include "launch.h"
#include "refine.cuh"
#include "score_fma.cuh"
#include "score_mma.cuh"
#include "select.cuh"
#include "variants.h"

namespace hisa::cuda {

// Take up row m: its heads' weights, the blocks that are kept in any case, the first stage, if any.
__device__ __forceinline__ void begin_row(const RowsParams& params, SharedMemory& memory,
                                          int64_t m) {
  load_weights(params.queries, memory, m);
  const Extent extent(params, m);
  int32_t* blocks = memory.region.blocks();
  if (extent.pruned) {
    if (ptx::this_thread() == 0) extent.keep_ends(params, blocks);
  } else {
    for (uint32_t i = ptx::this_thread(); i < extent.kept; i += kThreads)
      blocks[i] = extent.start(params, extent.first + i);
  }
  __syncthreads();
  if (ptx::this_thread() == 0) {
    memory.m = m;
    memory.row = extent.row;
    memory.kept = extent.kept;
    memory.buffered = 0;
    memory.bar = Bar{};
    if (extent.row.empty())
      memory.stage = Stage{.last = true};
    else if (extent.pruned && extent.kept > 2)
      memory.stage = coarse_stage(params, extent.row, extent.first, extent.last, blocks);
    else
      memory.stage = token_stage(params, m, extent.row, extent.kept, blocks);
    memory.scored = memory.stage.scores != nullptr || memory.stage.count < memory.stage.source.size;
  }
  __syncthreads();
}

// Write what the stage selects, and set the next one; returns whether there is one.
__device__ __forceinline__ bool finish_stage(const RowsParams& params, SharedMemory& memory) {
  write_best(memory);
  const bool last = memory.stage.last;
  __syncthreads();
  if (!last && ptx::this_thread() == 0) {
    memory.buffered = 0;
    memory.bar = Bar{};
    memory.stage = token_stage(params, memory.m, memory.row, memory.kept, memory.region.blocks());
  }
  __syncthreads();
  return !last;
}

// NOTE: without an instruction that converts fp8, three blocks' registers do not suffice.
template <class Scorer, int kBlocks>
__global__ void __launch_bounds__(kThreads, ptx::kFp8Cvt ? kBlocks : kBlocksPerMultiprocessor)
    rows_kernel(const __grid_constant__ RowsParams params) {
  extern __shared__ uint4 shared[];
  auto& memory = *reinterpret_cast<SharedMemory*>(shared);
  char* extra = reinterpret_cast<char*>(shared) + kSharedBytes;
  char* row = extra + params.scorer_bytes;
  if (params.workspace != nullptr)
    row = params.workspace + blockIdx.x * row_bytes(params.chunk, params.capacity, params.kept);
  if (ptx::this_thread() == 0)
    memory.region = {.scores = reinterpret_cast<float*>(row),
                     .size = region_size(params.chunk, params.capacity),
                     .chunk = static_cast<uint32_t>(params.chunk),
                     .capacity = static_cast<uint32_t>(params.capacity)};
  __syncthreads();
  Scorer scorer(memory, extra, params.queries, params.keys.dim);

  // Rows from the last to the first: in a causal prefill the last ones take longest.
  for (int64_t m = params.queries.rows - 1 - blockIdx.x; m >= 0; m = memory.m - gridDim.x) {
    begin_row(params, memory, m);
    for (bool more = memory.scored; more; more = finish_stage(params, memory)) {
      for (uint32_t begin = 0; begin < memory.stage.source.size; begin += chunk_at(memory, begin)) {
        scorer.score(begin);
        __syncthreads();
        if (!memory.region.holds(memory.stage.source)) add_to_buffer(memory, begin);
      }
    }
    finish_row(params.output, memory.m, memory.stage, memory.scored);
    __syncthreads();
  }
}

template <class Scorer, int kBlocks>
cudaError_t launch(const RowsParams& params, const Geometry& geometry, cudaStream_t stream) {
  if constexpr (kBlocks == kBlocksPerMultiprocessor && Scorer::kThree)
    if (geometry.prunes) return launch<Scorer, 3>(params, geometry, stream);
  constexpr auto kernel = rows_kernel<Scorer, kBlocks>;
  if (const auto error = allow_shared<kernel>(geometry.device, geometry.shared_limit)) return error;
  return launch_blocks(kernel, geometry.grid, kThreads, geometry.shared, params, stream);
}

// Every variant is compiled for the type; the geometry says which one runs.
template <ElementType kType>
cudaError_t launch_rows_of(const RowsParams& params, const Geometry& geometry,
                           cudaStream_t stream) {
  cudaError_t error = cudaErrorInvalidValue;
  [&]<size_t... i>(std::index_sequence<i...>) {
    ((i == geometry.variant
          ? void(error = launch<MmaScorer<kType, kVariants[i]>, kBlocksPerMultiprocessor>(
                     params, geometry, stream))
          : void()),
     ...);
  }(std::make_index_sequence<kVariants.size()>());
  return error;
}

}  // namespace hisa::cuda
