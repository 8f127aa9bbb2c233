// Stage `pool` on a paged cache: a block of threads for each sequence, a warp for each block of
// keys that its new tokens complete.
//
// Sequences that share a page write its slot at the same time, and the same bytes.
#include <algorithm>

#include "launch.h"
#include "pages.cuh"
#include "pool.cuh"

namespace hisa::cuda {
namespace {

template <class T, bool kMean>
__global__ __launch_bounds__(kPoolWarps * 32, 3) void paged_pool_kernel(
    const __grid_constant__ PagedPoolParams params) {
  const PagedKeys& keys = params.keys;
  const int64_t sequence = blockIdx.x;
  const int64_t size = params.block_size;
  const int64_t length = find_length<kPoolWarps * 32>(keys, sequence);
  const int64_t step = int64_t{gridDim.y} * kPoolWarps;
  // From the last complete block backwards.
  for (int64_t end = (length / size - int64_t{blockIdx.y} * kPoolWarps - threadIdx.x / 32) * size;
       end > 0 && length - end < params.new_tokens; end -= step * size) {
    const int64_t slot = keys.table.page(sequence, end / keys.page_size - 1);
    pool_block<T, kMean>(
        static_cast<int>(size), static_cast<int>(keys.dim),
        reinterpret_cast<T*>(static_cast<char*>(params.pooled) + slot * params.pooled_stride),
        params.pooled_scale + slot * params.scale_stride,
        [&](int i) { return find_token(keys, sequence, end - size + i); });
  }
}

constexpr int64_t kMostGridY = 1024;

template <class T>
void launch(const PagedPoolParams& params, cudaStream_t stream) {
  const int64_t blocks =
      (std::min(params.new_tokens, params.keys.room) + params.block_size - 1) / params.block_size;
  const dim3 grid(static_cast<unsigned>(params.keys.table.sequences),
                  static_cast<unsigned>(
                      std::clamp<int64_t>((blocks + kPoolWarps - 1) / kPoolWarps, 1, kMostGridY)));
  if (params.pooling == Pooling::kMean)
    paged_pool_kernel<T, true><<<grid, kPoolWarps * 32, 0, stream>>>(params);
  else
    paged_pool_kernel<T, false><<<grid, kPoolWarps * 32, 0, stream>>>(params);
}

}  // namespace

cudaError_t launch_paged_pool(const PagedPoolParams& params, cudaStream_t stream) {
  if (params.keys.table.sequences == 0) return cudaSuccess;
  switch (params.keys.type) {
    case ElementType::kFloat32: launch<float>(params, stream); break;
    case ElementType::kBFloat16: launch<__nv_bfloat16>(params, stream); break;
    case ElementType::kFloat16: launch<__half>(params, stream); break;
    case ElementType::kFloat8E4M3: launch<__nv_fp8_e4m3>(params, stream); break;
  }
  return cudaGetLastError();
}

}  // namespace hisa::cuda
