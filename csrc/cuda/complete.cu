// Unused slots of a selection filled, and its positions made absolute: one block of threads per
// row.
//
// Most rows of a long prefill are full and begin at 0: nothing of them is written, and only their
// last slot is read.
#include "../complete.h"

#include "launch.h"

namespace hisa::cuda {
namespace {

constexpr int kRowThreads = 128;

__global__ __launch_bounds__(kRowThreads) void complete_kernel(
    const __grid_constant__ CompleteParams params) {
  const int64_t m = blockIdx.x;
  int32_t* const row = params.indices + m * params.topk;
  const CompleteWindow window(params, m);
  const bool full = row[params.topk - 1] >= 0;
  const int64_t count = full ? params.topk : count_selected(row, params.topk);
  __syncthreads();  // before a slot is filled that others have yet to look at
  for (int64_t i = count + threadIdx.x; i < params.topk; i += kRowThreads)
    row[i] = static_cast<int32_t>(filler(row, count, i - count, window, params.keys));
  if (window.start == 0) return;
  __syncthreads();  // the fillers were found among relative positions
  for (int64_t i = threadIdx.x; i < count; i += kRowThreads)
    row[i] += static_cast<int32_t>(window.start);
}

}  // namespace

cudaError_t launch_complete(const CompleteParams& params, cudaStream_t stream) {
  complete_kernel<<<static_cast<unsigned>(params.rows), kRowThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace hisa::cuda
