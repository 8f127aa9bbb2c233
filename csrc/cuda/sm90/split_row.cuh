// What a cluster of blocks does for a row, found by each of them.
#pragma once

#include "split_memory.cuh"

namespace hisa::cuda::sm90 {

struct SplitRow {
  uint32_t m;
  const int32_t* ids;  // of the pages of its sequence, or null
  int32_t start, end, origin;  // see Row; in pages, of the sequence
  uint32_t first, last;  // blocks
  uint32_t kept;
  bool pruned;
  uint32_t skipped, size;  // tokens of the blocks kept: those in front of the window, those in it
  uint32_t count;  // that are selected

  // Blocks that it chooses among.
  __device__ uint32_t inner() const { return last - first - 1; }
  __device__ int32_t first_token(uint32_t block, int block_shift) const {
    return origin + static_cast<int32_t>(block << block_shift);
  }
};

// The first of a sequence's pages that is none, of those of `tokens` tokens; else how many these
// are. For this thread's share of them.
__device__ __forceinline__ uint32_t find_missing(const PageTable& table, const int32_t* ids,
                                                 const int32_t& tokens, int page_shift) {
  constexpr uint32_t kBatch = 4;  // vectors of ids on their way at a time
  const auto width = static_cast<uint32_t>(table.width);
  const bool aligned = reinterpret_cast<uintptr_t>(ids) % 16 == 0;
  const uint32_t quads = aligned ? width / 4 : 0;
  // The first batch comes together with the number of tokens.
  const int64_t wanted = max(tokens, 0);
  uint32_t missing = 0;  // pages, so far
  const auto look = [&](uint32_t i, int32_t id) {
    if (static_cast<uint32_t>(id) >= table.pages) missing = min(missing, i);
  };
#pragma unroll 1
  for (uint32_t begin = threadIdx.x;; begin += kBatch * kSplitThreads) {
    int4 four[kBatch];
#pragma unroll
    for (uint32_t j = 0; j < kBatch; ++j) {
      const uint32_t quad = begin + j * kSplitThreads;
      four[j] = quad < quads ? reinterpret_cast<const int4*>(ids)[quad] : int4{};
    }
    if (begin == threadIdx.x)
      missing = static_cast<uint32_t>(
          min(int64_t{width}, (wanted + (int64_t{1} << page_shift) - 1) >> page_shift));
#pragma unroll
    for (uint32_t j = 0; j < kBatch; ++j) {
      const uint32_t i = (begin + j * kSplitThreads) * 4;
      look(i, four[j].x), look(i + 1, four[j].y), look(i + 2, four[j].z), look(i + 3, four[j].w);
    }
    if ((begin + kBatch * kSplitThreads) * 4 >= min(missing, quads * 4)) break;
  }
#pragma unroll 4
  for (uint32_t i = quads * 4 + threadIdx.x; i < missing; i += kSplitThreads) look(i, ids[i]);
  return missing;
}

// Tokens of a sequence. All threads call it; it has a barrier.
__device__ __forceinline__ int32_t find_length(const SplitParams& params, SplitShared& shared,
                                               uint32_t sequence, const int32_t* ids) {
  const int32_t& tokens = params.table.lengths[sequence];
  uint32_t pages = find_missing(params.table, ids, tokens, params.page_shift);
  pages = __reduce_min_sync(~0U, pages);
  if (threadIdx.x % 32 == 0) shared.sums[threadIdx.x / 32] = pages;
  __syncthreads();
  pages = __reduce_min_sync(~0U, shared.sums[threadIdx.x % kSplitWarps]);
  return min(max(tokens, 0), static_cast<int32_t>(pages << params.page_shift));
}

// All threads call it.
__device__ __forceinline__ SplitRow describe_split(const SplitParams& params, SplitShared& shared,
                                                   uint32_t m) {
  SplitRow row{.m = m};
  if (params.table.ids != nullptr) {
    const uint32_t sequence = m / params.next_n;
    const uint32_t later = params.next_n - 1 - m % params.next_n;  // rows behind this one
    row.ids = params.table.ids + sequence * params.table.stride;
    row.end = find_length(params, shared, sequence, row.ids) - static_cast<int32_t>(later);
  } else {
    const Row found = find_row(params.windows, m, params.count);
    row.start = static_cast<int32_t>(found.start);
    row.end = static_cast<int32_t>(found.end);
    row.origin = static_cast<int32_t>(found.origin);
  }
  if (row.start >= row.end) return row;
  const int shift = params.block_shift;
  row.first = static_cast<uint32_t>(row.start - row.origin) >> shift;
  row.last = static_cast<uint32_t>(row.end - 1 - row.origin) >> shift;
  row.pruned = row.last - row.first >= params.block_topk;
  row.kept = min(params.block_topk, row.last - row.first + 1);
  row.skipped = static_cast<uint32_t>(row.start - row.first_token(row.first, shift));
  row.size = ((row.kept - 1) << shift) - row.skipped +
             static_cast<uint32_t>(row.end - row.first_token(row.last, shift));
  row.count = min(static_cast<uint32_t>(params.output.topk), row.size);
  return row;
}

}  // namespace hisa::cuda::sm90
