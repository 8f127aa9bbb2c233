// Few rows, as in decoding: a cluster of blocks of threads for each row, which scores the row's
// blocks, and then the tokens of those it keeps, in one launch. No torch here.
#pragma once

#include <cuda_runtime_api.h>

#include "../../pages.h"
#include "../../plan.h"
#include "../limits.h"
#include "../params.h"

namespace hisa::cuda::sm90 {

inline constexpr int kMostPeers = 16;    // blocks of a cluster
inline constexpr int kSplitScorers = 4;  // warpgroups of a block
inline constexpr int kSplitThreads = 128 * kSplitScorers;
inline constexpr int kSplitWarps = kSplitThreads / 32;
inline constexpr int kSplitTile = 64;   // keys of a product
inline constexpr int kSplitStages = 2;  // tiles of a scorer in shared memory
inline constexpr int64_t kMostScores = 16384;  // of a row at once, on chip
inline constexpr int64_t kSplitBins = 4 * kSplitThreads;  // of a histogram
inline constexpr int64_t kMostRanked = 256;  // scores of a bin

// Where keys lie, by number: key n is key n % 2^page_shift of page n >> page_shift. Keys that lie
// side by side are on a single page.
struct Storage {
  const char* data;
  const float* scale;  // null: all 1
  uint32_t unit;  // of distances, in bytes
  uint32_t page_stride, stride;  // in units
  uint32_t scale_page_stride;  // in bytes
  int page_shift;
};

// Of shared memory, bytes from its start on: queries, then the rest.
struct SplitLayout {
  int64_t keys, scale, slots, tokens, blocks, shared, total;
};

struct SplitParams {
  Queries queries;
  Output output;
  Storage keys, pooled;
  Windows windows;  // of keys that lie side by side
  int64_t count;    // of these
  PageTable table;  // of keys in pages; ids: null where there are none
  uint32_t next_n;  // see PagedWindows
  int page_shift;   // log2 of a page's keys
  bool physical;    // see PagedIndexParams
  uint32_t block_topk;
  int block_shift;  // log2 of the block size
  uint32_t peers;   // blocks of a cluster
  SplitLayout at;
};

struct SplitPlan {
  bool splits;  // whether it is a call for this kernel
  int64_t tiles;  // of a row at once, at most
  SplitLayout alone, together;  // without peers and with
  int64_t shared_limit;  // bytes that one block can have
  int device;
};

// The keys of the lowest and the highest of some scores; see to_key().
struct alignas(16) ScoreRange {
  uint32_t low, high;
};

// What a block's threads tell each other, and its peers.
struct alignas(16) SplitShared {
  ScoreRange ranges[2][kMostPeers];  // of each peer's scores of blocks, of tokens
  uint64_t full[2];                  // see SplitMemory::full()
  ScoreRange range[kSplitWarps];     // of each warp's
  uint32_t sums[kSplitWarps];
  uint32_t counts[2][kSplitWarps];
  uint32_t bin, need, size, ranked;  // see SplitSelector
  float bar;
  uint32_t ties;
};

// Whether, and how, a call that sm90::takes() is split.
SplitPlan plan_split(const Shape& shape, const DeviceLimits& limits);
// Whether distances of keys fit into what the kernel has for them.
bool can_split(const PagedIndexParams& call);
cudaError_t launch_split(const RowsParams& rows, const SplitPlan& plan, cudaStream_t stream);
cudaError_t launch_split(const PagedIndexParams& call, const SplitPlan& plan, cudaStream_t stream);

// One translation unit each: split_fp8.cu, split_bf16.cu.
template <ElementType kType>
cudaError_t launch_split_of(const SplitParams& params, const SplitPlan& plan, int64_t dim,
                            cudaStream_t stream);

}  // namespace hisa::cuda::sm90
