// Stage `pool` on a paged cache: a block of threads for each sequence, or several of them that take
// turns with the blocks of keys that its new tokens complete.
//
//   copy   a block's keys and scales to shared memory, all of them on their way at once
//   pool   a thread for each channel, the tokens one after the other
//
// A step waits for memory twice: for the sequence's length and row of the table, then for the keys.
// NOTE: nothing is known of a sequence until all of its row has been looked at, as it ends before a
// page that is missing. The block that it completes if none is missing is copied in the meantime.
//
// Sequences that share a page write its slot at the same time, and the same bytes.
#include <algorithm>

#include "launch.h"
#include "overlap.cuh"
#include "pages.cuh"
#include "pool.cuh"
#include "ptx/copy.cuh"
#include "ptx/overlap.cuh"
#include "ptx/shared.cuh"

namespace hisa::cuda {
namespace {

constexpr int kPoolThreads = 256;  // as many as a key has channels, at most
constexpr int kStep = 16;  // tokens of a chunk are a multiple of it
constexpr int kMostCopied = 32 << 10;  // bytes of keys
constexpr int64_t kMostBlocks = 1024;  // of threads, unless there are more sequences

// What of a block of keys is in shared memory at a time.
struct Chunk {
  int tokens;  // a power of two
  int key_bytes;  // of each

  __host__ __device__ int scales_at() const { return tokens * key_bytes; }
  int bytes() const { return scales_at() + tokens * static_cast<int>(sizeof(float)); }
};

Chunk make_chunk(const PagedPoolParams& params) {
  Chunk chunk{static_cast<int>(params.block_size),
              static_cast<int>(params.keys.dim * element_size(params.keys.type))};
  while (chunk.scales_at() > kMostCopied) chunk.tokens /= 2;
  return chunk;
}

// Tokens from `first` on, [tokens, dim] and their scales. Those of missing pages stay as they are.
__device__ void copy_chunk(const PagedKeys& keys, int64_t sequence, int first, const Chunk& chunk,
                           char* memory) {
  const int page_shift = log2_of(keys.page_size);
  const int run_shift = min(page_shift, log2_of(chunk.tokens));  // log2 of tokens side by side
  const int runs = chunk.tokens >> run_shift;  // at most 16, a lane for each
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int page = (first + (lane << run_shift)) >> page_shift;
  const auto id = static_cast<int32_t>(lane < runs ? keys.table.page(sequence, page) : -1);
  const int64_t at = first & (keys.page_size - 1);  // in the first page
  const int bytes = chunk.key_bytes << run_shift;
  const uint32_t to = ptx::shared_address(memory);
#pragma unroll 1
  for (int run = 0; run < runs; ++run) {
    const int64_t from = __shfl_sync(~0U, id, run);
    if (from < 0) continue;
    const char* const run_keys =
        static_cast<const char*>(keys.data) + from * keys.stride + at * chunk.key_bytes;
#pragma unroll 4
    for (int i = static_cast<int>(threadIdx.x) * 16; i < bytes; i += kPoolThreads * 16)
      ptx::copy_16(to + run * bytes + i, run_keys + i, true);
  }
  const int token = static_cast<int>(threadIdx.x) * kLane;
  const int64_t from = __shfl_sync(~0U, id, (token >> run_shift) % 32);
  if (token < chunk.tokens) {
    char* const scales = memory + chunk.scales_at();
    if (keys.scale == nullptr)
      reinterpret_cast<Floats*>(scales)[threadIdx.x] = {1.0F, 1.0F, 1.0F, 1.0F};
    else if (from >= 0)
      ptx::copy_16(ptx::shared_address(scales) + token * sizeof(float),
                   static_cast<const char*>(keys.scale) + from * keys.scale_stride +
                       (at + (token & ((1 << run_shift) - 1))) * sizeof(float),
                   true);
  }
  ptx::commit_copies();
}

// The tokens of a chunk, added to one channel.
template <class T, bool kMean>
__device__ float pool_chunk(float pooled, const Chunk& chunk, int dim, int channel,
                            const char* memory) {
  const T* key = reinterpret_cast<const T*>(memory) + channel;
  const auto* scale = reinterpret_cast<const Floats*>(memory + chunk.scales_at());
#pragma unroll 2
  for (int first = 0; first < chunk.tokens; first += kStep) {
    T x[kStep];
    Floats scales[kStep / kLane];
#pragma unroll
    for (int i = 0; i < kStep; ++i) x[i] = key[i * dim];
#pragma unroll
    for (int i = 0; i < kStep / kLane; ++i) scales[i] = scale[i];
#pragma unroll
    for (int i = 0; i < kStep; ++i)
      pooled = pool_value<kMean>(pooled, widen(x[i]), scales[i / kLane].at[i % kLane]);
    key += kStep * dim;
    scale += kStep / kLane;
  }
  return pooled;
}

// The largest magnitude of all threads; NaN if there is one.
__device__ float find_most(float x) {
  __shared__ float most[kPoolThreads / 32];
  const Floats mine[1] = {{x, 0.0F, 0.0F, 0.0F}};
  const float of_warp = find_amax(mine);
  if (threadIdx.x % 32 == 0) most[threadIdx.x / 32] = of_warp;
  __syncthreads();
  const Floats all[1] = {{most[threadIdx.x % (kPoolThreads / 32)], 0.0F, 0.0F, 0.0F}};
  return find_amax(all);
}

template <class T, bool kMean>
__global__ __launch_bounds__(kPoolThreads) void paged_pool_kernel(
    const __grid_constant__ PagedPoolParams params, const Chunk chunk) {
  extern __shared__ __align__(16) char memory[];
  ptx::let_next_kernel_start();
  ptx::wait_for_previous_kernel();
  const PagedKeys& keys = params.keys;
  const int64_t sequence = blockIdx.x;
  const auto size = static_cast<int>(params.block_size);
  const auto dim = static_cast<int>(keys.dim);
  const auto channel = static_cast<int>(threadIdx.x);
  const TableRow<kPoolThreads> row(keys, sequence);
  // The end of this block of threads' last block of keys that is completed; 0: none.
  const auto last_end = [&](int tokens) {
    const int end = (tokens & -size) - static_cast<int>(blockIdx.y) * size;
    return end > 0 && tokens - end < params.new_tokens ? end : 0;
  };

  const int ahead = last_end(row.wanted());
  if (ahead > 0) copy_chunk(keys, sequence, ahead - size, chunk, memory);
  const int length = row.length();
  if (length < row.wanted()) ptx::wait_for_copies<0>();  // perhaps in vain
  for (int end = last_end(length); end > 0 && length - end < params.new_tokens;
       end -= static_cast<int>(gridDim.y) * size) {
    float pooled = kNothingPooled<kMean>;
    for (int first = 0; first < size; first += chunk.tokens) {
      if (end != ahead || first > 0) {
        __syncthreads();  // behind the last reader
        copy_chunk(keys, sequence, end - size + first, chunk, memory);
      }
      ptx::wait_for_copies<0>();
      __syncthreads();
      if (channel < dim) pooled = pool_chunk<T, kMean>(pooled, chunk, dim, channel, memory);
    }
    if (channel >= dim) pooled = 0.0F;
    if constexpr (kMean) pooled = __fdiv_rn(pooled, static_cast<float>(size));
    float scale = 1.0F;
    if constexpr (sizeof(T) == 1) {
      scale = scale_of(find_most(pooled));
      pooled = __fdiv_rn(pooled, scale);
    }
    const int64_t slot = keys.table.page(sequence, (end >> log2_of(keys.page_size)) - 1);
    auto* const to = static_cast<char*>(params.pooled) + slot * params.pooled_stride;
    if (channel < dim) narrow(pooled, reinterpret_cast<T*>(to)[channel]);
    if (channel == 0) params.pooled_scale[slot * params.scale_stride] = scale;
  }
}

template <class T>
void launch(const PagedPoolParams& params, cudaStream_t stream) {
  const int64_t sequences = params.keys.table.sequences;
  const int64_t blocks =  // of a sequence, at most
      (std::min(params.new_tokens, params.keys.room) + params.block_size - 1) / params.block_size;
  const int64_t most = std::max<int64_t>(1, kMostBlocks / sequences);
  const dim3 grid(static_cast<unsigned>(sequences),
                  static_cast<unsigned>(std::clamp<int64_t>(blocks, 1, most)));
  const Chunk chunk = make_chunk(params);
  if (params.pooling == Pooling::kMean)
    launch_overlapping<paged_pool_kernel<T, true>>(grid, kPoolThreads, chunk.bytes(), stream,
                                                   params, chunk);
  else
    launch_overlapping<paged_pool_kernel<T, false>>(grid, kPoolThreads, chunk.bytes(), stream,
                                                    params, chunk);
}

}  // namespace

cudaError_t launch_paged_pool(const PagedPoolParams& params, cudaStream_t stream) {
  if (params.keys.table.sequences == 0) return cudaSuccess;
  return launch_for_any(params.keys.type, [&]<class T> { launch<T>(params, stream); });
}

}  // namespace hisa::cuda
