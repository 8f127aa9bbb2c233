#include "split_launch.cuh"

namespace hisa::cuda::sm90 {

template cudaError_t launch_split_of<ElementType::kFloat8E4M3>(const SplitParams&, const SplitPlan&,
                                                               int64_t, cudaStream_t);

}  // namespace hisa::cuda::sm90
