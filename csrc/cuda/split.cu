// The selection of split.cuh, whatever the type of the keys: a block of threads for each row.
#include "launch.cuh"
#include "ptx/thread.cuh"
#include "select.cuh"
#include "split_stage.cuh"

namespace hisa::cuda {

__global__ void __launch_bounds__(kSelectThreads)
    select_kernel(const __grid_constant__ SplitStage stage) {
  extern __shared__ uint4 shared[];
  auto& memory = *reinterpret_cast<SharedMemory*>(shared);
  const int64_t m = blockIdx.x;
  if (ptx::this_thread() == 0) {
    const Extent extent(stage.call, m);
    begin_stage(stage, memory, m, extent);
    if (stage.coarse && extent.pruned) extent.keep_ends(stage.call, memory.region.blocks());
  }
  __syncthreads();
  if (memory.scored) write_best<kSelectThreads>(memory);
  if (!stage.coarse) finish_row<kSelectThreads>(stage.call.output, m, memory.stage, memory.scored);
}

cudaError_t launch_select(const SplitStage& stage, cudaStream_t stream) {
  constexpr int64_t kBytes = kSharedBytes + int64_t{kHistogram} * 4;
  return launch_blocks(select_kernel, stage.call.queries.rows, kSelectThreads, kBytes, stage,
                       stream);
}

}  // namespace hisa::cuda
