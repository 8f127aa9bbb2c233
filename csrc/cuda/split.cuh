// Few rows, as in decoding: several blocks of threads score a row, a part each, and one selects.
// One launch after the other, each for all rows:
//
//   scores   coarse: of pooled keys                      -> workspace
//   select   coarse: the best blocks, and the two ends   -> workspace, the row's list of blocks
//   scores   refine, flat: of tokens                     -> workspace
//   select   refine, flat: the best tokens               -> result
//
// Stages, scorers and selection are those of rows.cuh. A key's score depends neither on its place
// in a tile nor on the keys beside it, and candidates are selected in the same order: so the
// results are the same, to the bit, whatever the number of parts.
//
// In the workspace each row has scores for the longest stage, behind which is its list of blocks:
// Region, as in rows.cuh, but that all candidates fit. Of what is in it a launch reads only what
// the launches before it have written, for the row.
#pragma once

#include <utility>

#include "launch.cuh"
#include "ptx/thread.cuh"
#include "score_fma.cuh"
#include "score_mma.cuh"
#include "split_stage.cuh"
#include "variants.h"

namespace hisa::cuda {

// Positions of a part: its row's divided as evenly as whole steps of a block's warps allow. So no
// tile reaches from one part into another.
struct Part {
  uint32_t begin;
  uint32_t size;  // or to the end, if that comes first; there is none if the end is before `begin`

  __device__ Part(uint32_t positions, uint32_t parts, uint32_t number) {
    const uint32_t step = parts * kPartStep;
    size = (positions + step - 1) / step * kPartStep;
    begin = number * size;
  }
};

template <class Scorer>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    scores_kernel(const __grid_constant__ SplitStage stage) {
  extern __shared__ uint4 shared[];
  auto& memory = *reinterpret_cast<SharedMemory*>(shared);
  const int64_t m = blockIdx.x / stage.parts;
  load_weights(stage.call.queries, memory, m);
  if (ptx::this_thread() == 0) begin_stage(stage, memory, m, Extent(stage.call, m));
  __syncthreads();
  const uint32_t& positions = memory.stage.source.size;
  const Part part(positions, stage.parts, blockIdx.x % stage.parts);
  if (!memory.scored || part.begin >= positions) return;  // as all threads do
  if (ptx::this_thread() == 0) {  // a chunk, at its place among the row's scores
    memory.region.scores += part.begin;
    memory.region.size = 0;
    memory.region.chunk = part.size;
  }
  __syncthreads();
  Scorer scorer(memory, reinterpret_cast<char*>(shared) + kSharedBytes, stage.call.queries,
                stage.call.keys.dim);
  // NOTE: one turn. In a straight line ptxas has more at hand for longer, and spills with fp8.
#pragma unroll 1
  for (uint32_t begin = part.begin; begin < positions; begin += positions) scorer.score(begin);
}

template <class Scorer>
cudaError_t launch_scores(const SplitStage& stage, const Geometry& geometry, cudaStream_t stream) {
  constexpr auto kernel = scores_kernel<Scorer>;
  if (const auto error = allow_shared<kernel>(geometry.device, geometry.shared_limit)) return error;
  return launch_blocks(kernel, stage.call.queries.rows * stage.parts, kThreads, geometry.shared,
                       stage, stream);
}

// Every variant is compiled for the type; the geometry says which one runs.
template <ElementType kType>
cudaError_t launch_scores_of(const SplitStage& stage, const Geometry& geometry,
                             cudaStream_t stream) {
  cudaError_t error = cudaErrorInvalidValue;
  [&]<size_t... i>(std::index_sequence<i...>) {
    ((i == geometry.variant
          ? void(error = launch_scores<MmaScorer<kType, kVariants[i]>>(stage, geometry, stream))
          : void()),
     ...);
  }(std::make_index_sequence<kVariants.size()>());
  return error;
}

}  // namespace hisa::cuda
