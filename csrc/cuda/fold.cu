// Weights as the indexer takes them, one for each thread.
#include "lanes.cuh"
#include "launch.h"

namespace hisa::cuda {
namespace {

constexpr int kThreads = 256;

template <class T>
__global__ __launch_bounds__(kThreads) void fold_kernel(const __grid_constant__ FoldParams params) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= params.count) return;
  const float product = __fmul_rn(widen(static_cast<const T*>(params.weights)[i]), params.factor);
  params.folded[i] = params.scale != nullptr ? __fmul_rn(product, params.scale[i]) : product;
}

template <class T>
void launch(const FoldParams& params, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>((params.count + kThreads - 1) / kThreads);
  fold_kernel<T><<<blocks, kThreads, 0, stream>>>(params);
}

}  // namespace

cudaError_t launch_fold(const FoldParams& params, cudaStream_t stream) {
  return launch_for_floats(params.type, [&]<class T> { launch<T>(params, stream); });
}

}  // namespace hisa::cuda
