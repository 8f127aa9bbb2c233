// The kernels around those that score, in a paged call: see paged.h.
#include "paged.h"

#include <algorithm>

#include "pages.cuh"

namespace hisa::cuda {
namespace {

constexpr int kCopyThreads = 128;
constexpr int64_t kMostGridY = 1024;
using Vector = uint4;  // 16 bytes, of which rows and pages are multiples

// Tokens that row `of` of a sequence sees, and their blocks.
struct Seen {
  int64_t tokens, blocks;

  __device__ Seen(const PagedPart& part, int64_t length, int64_t of)
      : tokens(max(int64_t{0}, length - (part.call.windows.next_n - 1 - of))),
        blocks((tokens + part.call.block_size - 1) / part.call.block_size) {}
};

// A block of threads for some blocks of one sequence, a warp for each of them at a time.
__global__ __launch_bounds__(kCopyThreads) void pooled_kernel(
    const __grid_constant__ PagedPart part) {
  const PagedIndexParams& call = part.call;
  const int64_t n = blockIdx.x;
  const int64_t sequence = part.first + n;
  const int64_t length = find_length<kCopyThreads>(call.keys, sequence);
  const auto next_n = static_cast<int>(call.windows.next_n);
  if (blockIdx.y == 0) {
    if (threadIdx.x == 0) {
      if (part.direct) {
        part.edges[n] = static_cast<int32_t>(n * call.keys.room);
        if (n == part.count - 1)
          part.edges[part.count] =
              static_cast<int32_t>(min(part.count * call.keys.room, int64_t{INT32_MAX}));
      } else {
        part.lengths[n] = static_cast<int32_t>(length);
      }
    }
    for (int of = static_cast<int>(threadIdx.x); of < next_n; of += kCopyThreads) {
      const Seen seen(part, length, of);
      const bool pruned = seen.blocks > call.block_topk;
      const int64_t slot = n * part.slots();  // of block 0
      const int64_t row = n * next_n + of;
      if (part.direct) {
        part.row_start[row] = static_cast<int32_t>(n * call.keys.room);
        part.row_end[row] = static_cast<int32_t>(n * call.keys.room + seen.tokens);
        continue;
      }
      part.block_start[row] = static_cast<int32_t>(pruned ? slot + 1 : 0);
      part.block_end[row] = static_cast<int32_t>(pruned ? slot + seen.blocks - 1 : 0);
    }
  }
  if (!part.prunes()) return;
  const PagedKeys& pooled = call.pooled;
  const int64_t vectors = pooled.dim * element_size(pooled.type) / sizeof(Vector);
  const int64_t complete = length / call.block_size;
  const auto lane = static_cast<int64_t>(threadIdx.x % 32);
  const int64_t step = int64_t{gridDim.y} * (kCopyThreads / 32);
  for (int64_t j = int64_t{blockIdx.y} * (kCopyThreads / 32) + threadIdx.x / 32; j < complete;
       j += step) {
    const int64_t slot = pooled.table.page(sequence, (j + 1) * pooled.entries - 1);
    const int64_t to = n * part.slots() + j;
    const auto* const from = reinterpret_cast<const Vector*>(static_cast<const char*>(pooled.data) +
                                                             slot * pooled.stride);
    for (int64_t i = lane; i < vectors; i += 32)
      reinterpret_cast<Vector*>(part.pooled)[to * vectors + i] = from[i];
    if (lane == 0)
      part.pooled_scale[to] = *reinterpret_cast<const float*>(
          static_cast<const char*>(pooled.scale) + slot * pooled.scale_stride);
  }
}

// A block of threads for each block of keys that a row keeps.
__global__ __launch_bounds__(kCopyThreads,
                             4) void tokens_kernel(const __grid_constant__ PagedPart part) {
  const PagedIndexParams& call = part.call;
  const PagedKeys& keys = call.keys;
  const int64_t next_n = call.windows.next_n;
  const int64_t size = call.block_size;
  const int64_t row = blockIdx.x;
  const int64_t n = row / next_n;
  const Seen seen(part, part.lengths[n], row % next_n);
  const int64_t kept = min(seen.blocks, call.block_topk);
  if (blockIdx.y == 0 && threadIdx.x == 0) {
    const int64_t start = row * part.kept * size;
    part.token_start[row] = static_cast<int32_t>(start);
    part.token_end[row] = static_cast<int32_t>(start + seen.tokens - (seen.blocks - kept) * size);
  }
  for (int64_t j = blockIdx.y; j < kept; j += gridDim.y) {
    int64_t block = j;
    if (seen.blocks > kept && j > 0)  // pruned: the first, those that were chosen, the last
      block = j == kept - 1 ? seen.blocks - 1 : part.chosen[row * (part.kept - 2) + j - 1] + 1;
    if (threadIdx.x == 0) part.blocks[row * part.kept + j] = static_cast<int32_t>(block);
    const int64_t to = (row * part.kept + j) * size;  // key
    const int64_t vectors = keys.dim * element_size(keys.type) / sizeof(Vector);
    const int64_t shared_out = min(size, seen.tokens - block * size);
#pragma unroll 4
    for (int64_t i = threadIdx.x; i < shared_out * vectors; i += kCopyThreads) {
      const TokenAt at = find_token(keys, part.first + n, block * size + i / vectors);
      reinterpret_cast<Vector*>(part.keys)[to * vectors + i] =
          static_cast<const Vector*>(at.key)[i % vectors];
    }
    if (part.scale != nullptr)
      for (int64_t i = threadIdx.x; i < shared_out; i += kCopyThreads)
        part.scale[to + i] = *find_token(keys, part.first + n, block * size + i).scale;
  }
}

// A block of threads for each row.
__global__ __launch_bounds__(kCopyThreads) void place_kernel(
    const __grid_constant__ PagedPart part) {
  const PagedIndexParams& call = part.call;
  const PagedKeys& keys = call.keys;
  const int64_t row = blockIdx.x;
  const int64_t sequence = part.first + row / call.windows.next_n;
  int32_t* const indices = call.output.indices + (part.first_row() + row) * call.output.topk;
  const auto size = static_cast<int32_t>(call.block_size);
  for (int64_t i = threadIdx.x; i < call.output.topk; i += kCopyThreads) {
    const int32_t gathered = indices[i];
    if (gathered < 0) continue;
    int64_t position = gathered;
    if (!part.direct)
      position = int64_t{part.blocks[row * part.kept + gathered / size]} * size + gathered % size;
    if (call.physical)
      position = keys.table.page(sequence, position / keys.page_size) * keys.page_size +
                 position % keys.page_size;
    indices[i] = static_cast<int32_t>(position);
  }
}

}  // namespace

cudaError_t gather_pooled(const PagedPart& part, cudaStream_t stream) {
  const int64_t most =
      part.prunes() ? (part.slots() + kCopyThreads / 32 - 1) / (kCopyThreads / 32) : 1;
  const int64_t wanted = std::max<int64_t>(1, kMostGridY / part.count);  // blocks of a sequence
  const dim3 grid(static_cast<unsigned>(part.count), static_cast<unsigned>(std::min(most, wanted)));
  pooled_kernel<<<grid, kCopyThreads, 0, stream>>>(part);
  return cudaGetLastError();
}

cudaError_t gather_tokens(const PagedPart& part, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(part.rows()),
                  static_cast<unsigned>(std::min(part.kept, kMostGridY)));
  tokens_kernel<<<grid, kCopyThreads, 0, stream>>>(part);
  return cudaGetLastError();
}

cudaError_t place(const PagedPart& part, cudaStream_t stream) {
  place_kernel<<<static_cast<unsigned>(part.rows()), kCopyThreads, 0, stream>>>(part);
  return cudaGetLastError();
}

}  // namespace hisa::cuda
