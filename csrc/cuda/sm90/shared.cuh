// Memory of a block of threads on Hopper, and who waits for whom.
//
//   loaders    warps      queries, weights and windows of a group of rows, taking turns -> group
//   copiers    warps      its keys, every kCopiers-th tile each                         -> tile
//   scorers    warpgroups every kScorers-th span of tiles each: products, scores        -> chunk
//   selector   warpgroup  what is best of a chunk, and of a row; writes the result
//
// There are several groups, and two chunks of scores, so a row's selection runs while the next row
// is scored, and a third is loaded. Where there is no room for these (kTight), queries have
// barriers of their own, and chunks are of a row each.
#pragma once

#include <numeric>
#include <type_traits>

#include "../ptx/mbarrier.cuh"
#include "params.h"
#include "select_row.cuh"

namespace hisa::cuda::sm90 {

template <ElementType kType_, int kHeads_, int kDim, int kGroup_, bool kPairs_ = false,
          bool kPages_ = false>
struct Config {
  static constexpr ElementType kType = kType_;
  static constexpr int kHeads = kHeads_;
  static constexpr int kGroup = kGroup_;
  static constexpr bool kPairs = kPairs_;  // of rows, with blocks of their own
  static constexpr bool kPages = kPages_;  // keys lie in pages
  static constexpr int kColumns = kHeads * kGroup;  // of a product
  static constexpr bool kWide = has_wide_products(kColumns, kHeads, kType);
  static constexpr int kElement = static_cast<int>(element_size(kType));
  static constexpr int kRowBytes = kDim * kElement;  // of a key
  static constexpr bool kTight = is_tight(kPairs, kRowBytes);
  static constexpr int kTile = tile_size(kColumns, kHeads, kRowBytes, kType, kPairs);
  static constexpr int kPitch = kRowBytes < 128 ? kRowBytes : 128;  // of a panel
  static constexpr int kPanels = kRowBytes / kPitch;  // channels of a key, one after the other
  static constexpr int kSteps = kPitch / 32;  // products along a panel
  // Warpgroups, and registers of their threads. At the start all threads have the same number, a
  // multiple of 8.
  static constexpr int kScorers = (kColumns > 64 && !kWide) || kRowBytes > 128 ? 2 : 3;
  static constexpr int kWarpgroups = 2 + kScorers;
  static constexpr int kThreads = 128 * kWarpgroups;
  static constexpr int kCopiers = 2;  // warps, of the warpgroup that loads
  static constexpr int kLoaders = 2;
  // Products of a tile, of 64 keys each.
  static constexpr int kParts = kTile / 64;
  // Adjacent tiles that a scorer takes at a time; a group has a multiple of them. Where it is two,
  // there are as many stages as scorers take together: a scorer finds its tiles in the same two
  // always, and addresses and phases cost it next to nothing. Not with two products for each tile,
  // where constant addresses do not fit into its registers.
  static constexpr int kSpan = kScorers == 3 && kParts == 1 ? 2 : 1;
  static constexpr int kSpans = kSpan * kScorers;  // tiles that all of them take
  // Tiles of a run, which a scorer goes through without a stop. Fewer, where there are few
  // registers.
  static constexpr int kRun = kSpan == 2 ? 2 : (kColumns > 64 ? 2 : 4) / kParts;
  // NOTE: a barrier tells only whether a phase is the one at hand or the one before. So each stage
  // has one copier and one scorer, who know by themselves that its last phase is over.
  static constexpr int kStageStep = std::lcm(kCopiers, kSpans);
  // In a run, a scorer holds on to a tile until its next one is there.
  static constexpr int kHeld = kSpan == 1 && kRun > 1 ? kScorers + 1 : kSpans;
  static constexpr int kGroups = kPairs ? 2 : kMaxGroups;  // at hand, at most
  static constexpr int kLeastStages = (kHeld + kStageStep - 1) / kStageStep * kStageStep;
  static_assert(kLeastStages <= kMaxStages);
  static_assert(kSpan == 1 || kMaxStages < 2 * kStageStep);
  static_assert(kMostChunk / 4 % (kSpan * kTile) == 0);
  static constexpr Boxes kBoxes = make_boxes(0, kTile);  // of each tile, with kSpan 2
  static constexpr int kStartRegisters = 65536 / kThreads / 8 * 8;
  static constexpr int kLoadRegisters = kPairs && !kWide ? 48 : 40;
  static constexpr int kSelectRegisters = (kScorers < 3 ? 160 : kWide ? 144 : 168) - kLoadRegisters;
  static constexpr int kScoreRegisters = kWide ? 112 : kScorers == 3 ? 104 : 176;
  static_assert(kRowBytes == 64 || kRowBytes % 128 == 0, "the swizzles in use");
  static_assert(kSelectRegisters + kLoadRegisters + kScorers * kScoreRegisters <=
                kStartRegisters * kWarpgroups);
};

// Blocks that a row keeps.
__device__ __forceinline__ uint32_t count_kept(const RowsParams& rows, const Row& row) {
  if (row.empty()) return 0;
  const int64_t first = (row.start - row.origin) >> rows.block_shift;
  const int64_t last = (row.end - 1 - row.origin) >> rows.block_shift;
  return static_cast<uint32_t>(min(rows.block_topk, last - first + 1));
}

struct GroupRow {
  Stage stage;
  bool scored;       // whether anyone needs its scores
  uint32_t shift;    // position 0 among the group's keys
  uint32_t kept;     // blocks; coarse only, like what follows
  bool pruned;
  int32_t first, last;  // their first tokens
};

// What two rows have to score, tile by tile: first what they have in common, then what only the
// first one has, then what only the second one has.
struct Pair {
  struct Tile {
    int32_t first;         // token
    uint16_t position[2];  // of that token, among each row's, from the start of its first block on
  };
  uint32_t ends[3];  // tiles up to the end of each kind, in whole spans
  uint32_t scale_shift[2];  // see Group
  Tile tiles[2 * kPairTiles];
  int32_t blocks[2][kPairBlocks];  // first tokens of those that each row keeps
};
struct NoPair {};

template <class C>
struct Group {
  int64_t m;  // first row
  uint32_t size;  // keys, see Params::work; of a pair, of the row that has more
  uint32_t tiles;  // to score, in whole spans
  uint32_t base;  // first key, where they are adjacent
  const int32_t* blocks;  // of the row, where they are not
  uint32_t scale_shift;  // scales in front of a box that are not the box's
  bool huge;  // some weight is above kMostWeight
  alignas(16) float weights[C::kColumns];
  GroupRow rows[C::kGroup];
  std::conditional_t<C::kPairs, Pair, NoPair> pair;
};

template <class C>
struct Shared {
  Group<C> groups[C::kGroups];
  Counts counts;
  RowBuffer buffers[C::kGroup];
  float bars[kMaxChunks][C::kGroup];  // that scores of a chunk need not be marked below; NaN: none
  uint32_t votes;  // see pairs_pay()
  ptx::Barrier group_full[C::kGroups], group_empty[C::kGroups];
  ptx::Barrier queries_full, queries_empty;  // kTight: apart from the rest of a group
  ptx::Barrier chunk_full[kMaxChunks], chunk_empty[kMaxChunks];
  ptx::Barrier tile_full[kMaxStages], tile_empty[kMaxStages];

  __device__ void init() {
    votes = 0;
    constexpr int kScorerWarps = 4 * C::kScorers;
    for (int i = 0; i < C::kGroups; ++i) {
      group_full[i].init(1);
      group_empty[i].init(kScorerWarps + kSelectorWarps + C::kCopiers);
    }
    queries_full.init(1);
    queries_empty.init(kScorerWarps);
    for (int i = 0; i < kMaxChunks; ++i) {
      chunk_full[i].init(kScorerWarps);
      chunk_empty[i].init(kSelectorWarps);
    }
    for (int i = 0; i < kMaxStages; ++i) {
      tile_full[i].init(1);
      tile_empty[i].init(4);
    }
    for (float (&of_chunk)[C::kGroup] : bars)
      for (float& bar : of_chunk) bar = NAN;
    ptx::fence_barrier_init();
  }
};

// Where the parts of dynamic shared memory are.
template <class C>
struct Memory {
  Shared<C>& shared;
  char* queries;  // [groups] of kQueryBytes; kTight: of one
  char* keys;  // [stages] of kTileBytes
  float* scale;  // [stages, boxes.tile]
  float* chunks;  // [chunks at hand, kGroup, chunk]; kTight: of a row each
  int32_t* chosen;  // [topk], kTight only
  uint32_t* marks;  // [chunks at hand, chunk / 16, kMarkWords], see Scorer::add_up()
  float* buffers;  // [kGroup, 2, capacity]

  static constexpr int kMarkWords = mark_words(C::kGroup);
  static constexpr int kQueryBytes = (C::kColumns * C::kRowBytes + 1023) / 1024 * 1024;
  static constexpr int kTileBytes = C::kTile * C::kRowBytes;

  __device__ Memory(char* start, const Params& params)
      : shared(*reinterpret_cast<Shared<C>*>(start)) {
    const RowsParams& rows = params.rows;
    const Layout at =
        make_layout(sizeof(Shared<C>), C::kGroup, C::kHeads, C::kRowBytes,
                    at_hand(C::kTight, C::kGroup, params.groups, params.chunks, rows.output.topk),
                    params.stages, params.boxes, rows.chunk, rows.capacity > 0,
                    rows.workspace == nullptr ? rows.capacity : 0);
    queries = start + at.queries;
    keys = start + at.keys;
    scale = reinterpret_cast<float*>(start + at.scale);
    chunks = reinterpret_cast<float*>(start + at.chunks);
    chosen = reinterpret_cast<int32_t*>(start + at.chosen);
    marks = reinterpret_cast<uint32_t*>(start + at.marks);
    buffers = reinterpret_cast<float*>(rows.workspace == nullptr
                                           ? start + at.buffers
                                           : rows.workspace + blockIdx.x * C::kGroup * 2 *
                                                                  rows.capacity * int64_t{4});
  }
  __device__ float* chunk(uint32_t i, int row, int64_t size) const {
    return chunks + (C::kTight ? i : i * C::kGroup + row) * size;
  }
  __device__ uint32_t* chunk_marks(uint32_t i, int64_t size) const {
    return marks + i * (size / 16 * kMarkWords);
  }
};

// Which of `count` buffers is next, and the parity of how often it was.
struct Turn {
  uint32_t count;
  uint32_t buffer = 0;
  uint32_t phase = 0;

  __device__ void next() {
    if (++buffer < count) return;
    buffer = 0;
    phase ^= 1U;
  }
};

// A block handles groups of rows from the last to the first: in a causal prefill the last ones take
// longest.
template <class C>
__device__ __forceinline__ int64_t last_group(const Params& params) {
  return (params.rows.queries.rows - 1) / C::kGroup - blockIdx.x;
}

}  // namespace hisa::cuda::sm90
