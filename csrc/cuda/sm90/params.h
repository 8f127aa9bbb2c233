// What the Hopper kernel gets, and how its memory is laid out. No torch here.
#pragma once

#include <cuda.h>

#include "../params.h"

namespace hisa::cuda::sm90 {

// Refine: for each row by itself, or for two rows at a time, whose common blocks are scored
// together. Of pages: for each row by itself; to the kernel it is kRefine.
enum class Work { kCoarse, kRefine, kRefinePairs, kFlat, kRefinePages };
constexpr bool is_refine(Work work) {
  return work == Work::kRefine || work == Work::kRefinePairs || work == Work::kRefinePages;
}

inline constexpr int kMaxStages = 8;     // tiles in shared memory
inline constexpr int kMaxGroups = 4;     // at hand
inline constexpr int kMaxChunks = 4;     // of scores
inline constexpr int64_t kFewBlocks = 1024;  // of a row, that a warp can select among
inline constexpr int kMostChunk = 2048;  // scores of one, where a row has several
inline constexpr int kPairBlocks = 64;   // of each row of a pair, at most
inline constexpr int kPairTiles = 128;   // likewise

// The kernels that are compiled, for fp8 and bf16: the one list that dispatch, plans and tests
// read. Rows of a group are scored together, against the same keys.
struct Variant {
  int heads;
  int dim;
};
inline constexpr Variant kVariants[] = {
    {16, 64}, {32, 64}, {64, 64}, {128, 64}, {16, 128}, {32, 128}, {64, 128}, {128, 128},
};
// Whether there is a kernel for pairs of rows: their heads have to fit into a product.
constexpr bool has_pairs(int heads) { return heads <= 64; }
// Whether keys of a pair are so long that there is no room beside them for the queries of two pairs
// and the scores of four rows: then of one, and of three. Rows of scores are used in turns.
constexpr bool is_tight(bool pairs, int64_t row_bytes) { return pairs && row_bytes > 128; }
inline constexpr int kTightRows = 3;
static_assert(kTightRows >= 2 && kTightRows <= kMaxChunks, "a pair waits for two at once");
// Rows of a group: one where each has blocks of its own, else as many as there are registers for.
constexpr int group_size(int heads, int dim, ElementType type, Work work) {
  if (work == Work::kRefinePairs) return 2;
  const int columns = dim * element_size(type) > 128 ? 64 : heads == 64 ? 128 : 64;
  return is_refine(work) || heads > columns ? 1 : columns / heads;
}
// Whether products have so many columns, of two rows, and take so little time, that three
// warpgroups with one product each keep the tensor cores busier than two with two each.
constexpr bool has_wide_products(int columns, int heads, ElementType type) {
  return columns > 64 && heads <= 64 && type == ElementType::kFloat8E4M3;
}
// Keys that are copied at a time. There is little room for them beside the scores of two rows,
// where three warpgroups have to have a tile each, and where keys are long.
constexpr int tile_size(int columns, int heads, int64_t row_bytes, ElementType type, bool pairs) {
  const bool long_keys = row_bytes > 128 && columns <= 64;
  return pairs || long_keys || has_wide_products(columns, heads, type) ? 64 : 128;
}

// A tile is copied in boxes: of a row's blocks, or the whole of it. A box of scales has to begin at
// a multiple of 16 bytes in the tensor and of 128 in shared memory, so it has up to 3 more in
// front.
struct Boxes {
  uint32_t keys;      // of a box
  uint32_t number;    // of a tile
  uint32_t scales;    // of a box
  uint32_t pitch;     // floats from one box of scales to the next
  uint32_t tile;      // floats of a tile's
  uint32_t half;      // from a key's scale to that of the 64th key behind it
};
constexpr Boxes make_boxes(int64_t block_size, int tile_keys) {  // 0: adjacent keys
  const auto all = static_cast<uint32_t>(tile_keys);
  const auto keys = block_size == 0 || block_size > all ? all : static_cast<uint32_t>(block_size);
  const uint32_t pitch = (keys + 4 + 31) / 32 * 32;
  return {keys,  all / keys,         keys + 4,
          pitch, all / keys * pitch, keys > 64 ? 64 : 64 / keys * pitch};
}

// Where the keys of a paged call are: key n is token n % room of sequence n / room, whose pages the
// table lists.
struct PageMap {
  const int32_t* ids;  // [sequences, width], rows `stride` apart
  int64_t stride;
  uint32_t sequences;
  uint32_t width;
  int32_t pages;  // that exist
  uint32_t room;  // keys of a sequence
  uint32_t page_shift;  // log2 of a page's keys
};

struct Params {
  Keys scored;      // by this kernel: rows.keys or rows.pooled
  // chunk: of a row's scores; capacity: 0 if all rows fit into a chunk; workspace:
  // [grid, group, 2, capacity] or null
  RowsParams rows;
  CUtensorMap queries;  // [rows, heads, dim], in boxes of a group
  CUtensorMap keys;     // [count, dim], in boxes of boxes.keys
  CUtensorMap scale;    // [scale_offset + count], in boxes of boxes.scales
  int32_t* kept;        // [rows, rows.kept] first tokens of the blocks kept; null for flat
  uint32_t scale_offset;  // floats in front of the first scale, which may not be aligned
  Work work;
  bool one_of_two;  // another kernel is there for the same rows: see pairs_pay()
  int stages;
  uint32_t groups, chunks;  // at hand
  Boxes boxes;
  PageMap pages;  // keys: [pages, page_size, dim]; scale: [pages, page_size]; if they are in pages
};

// Of a row that does not fit into a chunk, scorers mark which scores may be among the best: words
// for 16 keys of all rows of a group.
HISA_HOST_DEVICE constexpr int mark_words(int group) { return group > 2 ? group / 2 : 1; }

// What is at hand at the same time.
struct AtHand {
  int64_t queries;  // of so many groups
  int64_t chunks;  // of scores
  int64_t rows;  // of all chunks together
  int64_t chosen;  // numbers that a row selects, if they may not take the place of its scores
};
HISA_HOST_DEVICE constexpr AtHand at_hand(bool tight, int group, int64_t groups, int64_t chunks,
                                          int64_t topk) {
  return tight ? AtHand{1, chunks, chunks, (topk + 3) / 4 * 4}
               : AtHand{groups, chunks, chunks * group, 0};
}

// Bytes from the start of shared memory on. Boxes are swizzled, so they begin at multiples of 1024.
struct Layout {
  int64_t queries, keys, scale, chunks, chosen, marks, buffers, total;
};
HISA_HOST_DEVICE constexpr Layout make_layout(int64_t fixed, int group, int heads,
                                              int64_t row_bytes, const AtHand& at_hand, int stages,
                                              const Boxes& boxes, int64_t chunk, bool marked,
                                              int64_t capacity) {
  const int64_t queries = (fixed + 1023) / 1024 * 1024;
  const int64_t keys =
      queries + at_hand.queries * ((group * heads * row_bytes + 1023) / 1024 * 1024);
  const int64_t scale = keys + stages * int64_t{boxes.keys * boxes.number} * row_bytes;
  const int64_t chunks = scale + stages * int64_t{boxes.tile} * 4;
  const int64_t chosen = chunks + at_hand.rows * chunk * 4;
  const int64_t marks = chosen + at_hand.chosen * 4;
  const int64_t buffers =
      marks + (marked ? at_hand.chunks * chunk / 16 * mark_words(group) * 4 : 0);
  return {queries, keys, scale, chunks, chosen, marks, buffers, buffers + group * 2 * capacity * 4};
}

}  // namespace hisa::cuda::sm90
