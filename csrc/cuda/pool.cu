// Stage `pool`: one representative key per complete block, a warp for each slot.
//
// Slot i belongs to the block that holds token i * block_size; if that one is incomplete, the slot
// is zero, and nothing reads it.
#include "../windows.h"
#include "launch.h"
#include "pool.cuh"

namespace hisa::cuda {
namespace {

template <class T, bool kMean>
__global__ __launch_bounds__(kPoolWarps * 32,
                             3) void pool_kernel(const __grid_constant__ PoolParams params) {
  const Keys& keys = params.keys;
  const int64_t slot = int64_t{blockIdx.x} * kPoolWarps + threadIdx.x / 32;
  if (slot >= params.slots) return;
  const int64_t token = slot * params.block_size;
  const Segment segment = find_segment(params.windows, token, keys.count);
  const int64_t start =
      segment.begin + (token - segment.begin) / params.block_size * params.block_size;
  const bool complete = segment.begin < segment.end && start + params.block_size <= segment.end;
  const T* const first = static_cast<const T*>(keys.data) + start * keys.stride;
  const float* const scale = keys.scale == nullptr ? nullptr : keys.scale + start;
  pool_block<T, kMean>(
      complete ? static_cast<int>(params.block_size) : 0, static_cast<int>(keys.dim),
      static_cast<T*>(params.pooled) + slot * keys.dim, params.pooled_scale + slot, [&](int i) {
        return TokenAt{first + i * keys.stride, scale == nullptr ? nullptr : scale + i};
      });
}

template <class T>
void launch(const PoolParams& params, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>((params.slots + kPoolWarps - 1) / kPoolWarps);
  if (params.pooling == Pooling::kMean)
    pool_kernel<T, true><<<blocks, kPoolWarps * 32, 0, stream>>>(params);
  else
    pool_kernel<T, false><<<blocks, kPoolWarps * 32, 0, stream>>>(params);
}

}  // namespace

cudaError_t launch_pool(const PoolParams& params, cudaStream_t stream) {
  if (params.slots == 0) return cudaSuccess;
  return launch_for_any(params.keys.type, [&]<class T> { launch<T>(params, stream); });
}

}  // namespace hisa::cuda
