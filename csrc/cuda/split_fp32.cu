#include "split.cuh"

namespace hisa::cuda {

template <>
cudaError_t launch_scores_of<ElementType::kFloat32>(const SplitStage& stage,
                                                    const Geometry& geometry, cudaStream_t stream) {
  return launch_scores<FmaScorer>(stage, geometry, stream);
}

}  // namespace hisa::cuda
