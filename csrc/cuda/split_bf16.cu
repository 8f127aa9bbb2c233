#include "split.cuh"

namespace hisa::cuda {

template cudaError_t launch_scores_of<ElementType::kBFloat16>(const SplitStage&, const Geometry&,
                                                              cudaStream_t);

}  // namespace hisa::cuda
