#include "rows.cuh"

namespace hisa::cuda::sm90 {

template cudaError_t launch_kernel<ElementType::kBFloat16>(const Params&, const Plan&,
                                                           cudaStream_t);
template Needs find_needs<ElementType::kBFloat16>(int64_t, int64_t, Work);

}  // namespace hisa::cuda::sm90
