// Attention masks as windows: where each row's range of keys begins and ends, one block of threads
// for each row.
//
// A thread has several loads of 16 bytes under way. Most bring one value throughout, which takes a
// few instructions to find out. Where a range begins or ends, in what is not aligned, and where
// keys are not adjacent, they are looked at one by one. Cost: the mask is read once.
#include <algorithm>

#include "../mask.h"
#include "launch.h"

namespace hisa::cuda {
namespace {

constexpr int kMaxThreads = 1024;
constexpr int kInFlight = 4;             // loads of a thread
constexpr int64_t kManyRows = 1024;      // enough to fill a GPU with blocks of kUsualThreads
constexpr int64_t kUsualThreads = 256;
constexpr int64_t kMaxGridY = 65535;

using Vector = ulonglong2;  // 16 bytes

// What this thread finds in its share of a row.
template <class Mask>
__device__ MaskRow scan_keys(const typename Mask::Bits* keys, int32_t count, int64_t stride) {
  using Bits = typename Mask::Bits;
  constexpr auto kPerVector = static_cast<int32_t>(sizeof(Vector) / sizeof(Bits));
  MaskRow row = MaskRow::none();
  // [0, head), vectors, and from `tail` on
  const auto ahead = static_cast<int32_t>(-reinterpret_cast<uintptr_t>(keys) % sizeof(Vector));
  const int32_t head = stride == 1 ? min(count, ahead / static_cast<int32_t>(sizeof(Bits))) : count;
  const int32_t vectors = (count - head) / kPerVector;
  const int32_t tail = head + vectors * kPerVector;
  const auto thread = static_cast<int32_t>(threadIdx.x);
  const auto threads = static_cast<int32_t>(blockDim.x);
  for (int64_t key = thread; key < head; key += threads)
    row.add<Mask>(static_cast<int32_t>(key), 1, keys[key * stride]);
  for (int64_t key = tail + int64_t{thread}; key < count; key += threads)
    row.add<Mask>(static_cast<int32_t>(key), 1, keys[key * stride]);

  const auto* const body = reinterpret_cast<const Vector*>(keys + head);
  for (int32_t first = thread; first < vectors; first += kInFlight * threads) {
    Vector loaded[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i)
      if (first + i * threads < vectors) loaded[i] = body[first + i * threads];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      if (first + i * threads >= vectors) continue;
      const int32_t key = head + (first + i * threads) * kPerVector;
      const auto bits = static_cast<Bits>(loaded[i].x);
      if (((loaded[i].x ^ repeated(bits)) | (loaded[i].y ^ repeated(bits))) == 0) {
        row.add<Mask>(key, kPerVector, bits);
      } else {
#pragma unroll 4
        for (int32_t j = key; j < key + kPerVector; ++j) row.add<Mask>(j, 1, keys[j]);
      }
    }
  }
  return row;
}

__device__ MaskRow join_warp(MaskRow row) {
  return {__reduce_min_sync(~0U, row.first), __reduce_max_sync(~0U, row.end),
          __reduce_add_sync(~0U, row.count), __any_sync(~0U, row.unknown) != 0};
}

// What all threads found, known to the first warp.
__device__ MaskRow join_block(MaskRow row) {
  __shared__ MaskRow found[kMaxThreads / 32];
  row = join_warp(row);
  if (threadIdx.x % 32 == 0) found[threadIdx.x / 32] = row;
  __syncthreads();
  if (threadIdx.x < 32)
    row = join_warp(threadIdx.x < blockDim.x / 32 ? found[threadIdx.x] : MaskRow::none());
  __syncthreads();  // before the next row's are written
  return row;
}

__device__ void raise(int32_t& target, int32_t value) {
  if (value > 0) atomicMax(&target, value);
}

template <class Mask>
__global__ __launch_bounds__(kMaxThreads) void mask_kernel(
    const __grid_constant__ MaskParams params) {
  const auto* const data = static_cast<const typename Mask::Bits*>(params.data);
  for (int64_t entry = blockIdx.y; entry < params.entries; entry += gridDim.y) {
    for (int64_t row = blockIdx.x; row < params.rows; row += gridDim.x) {
      const MaskRow found =
          join_block(scan_keys<Mask>(data + entry * params.entry_stride + row * params.row_stride,
                                     static_cast<int32_t>(params.keys), params.key_stride));
      if (threadIdx.x != 0) continue;
      params.start[entry * params.rows + row] = found.start();
      params.end[entry * params.rows + row] = found.end;
      const MaskSummary summary = found.summary();
      raise(params.summary->unknown, summary.unknown);
      raise(params.summary->broken, summary.broken);
      raise(params.summary->longest, summary.longest);
      raise(params.summary->latest, summary.latest);
    }
  }
}

template <class Mask>
void launch(const MaskParams& params, cudaStream_t stream) {
  constexpr int64_t kStep = kInFlight * sizeof(Vector) / sizeof(typename Mask::Bits);
  const int64_t wanted = (params.keys / kStep + 31) / 32 * 32;
  const bool many = params.rows >= kManyRows || params.entries >= kManyRows;
  const auto threads = std::clamp<int64_t>(wanted, 32, many ? kUsualThreads : kMaxThreads);
  const dim3 grid(static_cast<unsigned>(std::min<int64_t>(params.rows, INT32_MAX)),
                  static_cast<unsigned>(std::min(params.entries, kMaxGridY)));
  mask_kernel<Mask><<<grid, static_cast<unsigned>(threads), 0, stream>>>(params);
}

}  // namespace

cudaError_t launch_mask(const MaskParams& params, cudaStream_t stream) {
  const cudaError_t cleared = cudaMemsetAsync(params.summary, 0, sizeof(MaskSummary), stream);
  if (cleared != cudaSuccess || params.entries == 0 || params.rows == 0) return cleared;
  switch (params.type) {
    case MaskType::kBool: launch<BoolMask>(params, stream); break;
    case MaskType::kFloat16: launch<Float16Mask>(params, stream); break;
    case MaskType::kBFloat16: launch<BFloat16Mask>(params, stream); break;
    case MaskType::kFloat32: launch<Float32Mask>(params, stream); break;
    case MaskType::kFloat64: launch<Float64Mask>(params, stream); break;
  }
  return cudaGetLastError();
}

}  // namespace hisa::cuda
