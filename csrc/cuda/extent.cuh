// What is known of a row before anything is scored: its heads' weights, its window in blocks.
#pragma once

#include "memory.cuh"
#include "ptx/thread.cuh"

namespace hisa::cuda {

// The blocks [first, last] that row m's window meets, numbered within its segment, and how many of
// them are kept: some, the first and the last among them, if it is pruned; else all, or if the call
// is flat, none.
struct Extent {
  Row row;
  int64_t first, last;
  uint32_t kept;
  bool pruned;

  __device__ __forceinline__ Extent(const RowsParams& params, int64_t m)
      : row(find_row(params.windows, m, params.keys.count)) {
    first = row.empty() ? 0 : (row.start - row.origin) >> params.block_shift;
    last = row.empty() ? 0 : (row.end - 1 - row.origin) >> params.block_shift;
    kept = static_cast<uint32_t>(min(params.block_topk, last - first + 1));
    pruned = params.block_topk > 0 && last - first >= params.block_topk;
  }

  // First token of a block.
  __device__ __forceinline__ int32_t start(const RowsParams& params, int64_t number) const {
    return static_cast<int32_t>(row.origin + (number << params.block_shift));
  }
  // Of a pruned row, by one thread.
  __device__ __forceinline__ void keep_ends(const RowsParams& params, int32_t* blocks) const {
    blocks[0] = start(params, first);
    blocks[kept - 1] = start(params, last);
  }
};

// The weights of row m's heads. All kThreads threads call it.
__device__ __forceinline__ void load_weights(const Queries& queries, SharedMemory& memory,
                                             int64_t m) {
  const int h = static_cast<int>(ptx::this_thread());
  static_assert(kThreads == sizeof(SharedMemory::weights) / sizeof(float), "one head per thread");
  memory.weights[weight_slot(h)] =
      h < queries.heads ? queries.weights[m * queries.weights_stride + h] : 0.0F;
}

}  // namespace hisa::cuda
