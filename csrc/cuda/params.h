// What the row kernel gets: one call's tensors, and how its memory is laid out. No torch here.
#pragma once

#include <cstdint>

#include "../params.h"

namespace hisa::cuda {

inline constexpr int kThreads = 128;    // of a block; a block handles one row at a time
inline constexpr int kWarps = kThreads / 32;
inline constexpr int kSelectThreads = 512;  // of a block that only selects: split.cuh
inline constexpr int kBlocksPerMultiprocessor = 2;  // of 255 registers a thread; or 3 of 168
inline constexpr int kBehind = 32;  // scores that a scorer may write behind those wanted
inline constexpr int kFmaHeads = 32;  // heads that the fp32 kernel handles together

struct RowsParams {
  Queries queries;
  Keys keys;
  Keys pooled{};  // slot i: the complete block that holds token i * block_size; none for flat
  Windows windows;
  Output output;
  int64_t block_topk = 0;  // 0: flat
  int block_shift = 0;  // log2 of the block size
  int64_t scorer_bytes = 0;  // of shared memory, for the scorer
  int64_t kept = 0;  // blocks that a row keeps at most
  int64_t chunk = 0;  // keys scored between two selections
  int64_t capacity = 0;  // candidates of the buffer
  char* workspace = nullptr;  // [grid, row_bytes()], null: in shared memory
};

// Scores that a row's region has room for, and bytes of the region and the row's list of blocks.
HISA_HOST_DEVICE constexpr int64_t region_size(int64_t chunk, int64_t capacity) {
  return chunk + kBehind + 2 * capacity;
}
HISA_HOST_DEVICE constexpr int64_t row_bytes(int64_t chunk, int64_t capacity, int64_t kept) {
  return (region_size(chunk, capacity) + kBehind + (kept + 3) / 4 * 4) * 4;
}

}  // namespace hisa::cuda
