// The warps that bring a group's queries and keys to shared memory.
#pragma once

#include "../coarse.cuh"
#include "../ptx/tensor_copy.cuh"
#include "../refine.cuh"
#include "pair.cuh"
#include "products.cuh"

namespace hisa::cuda::sm90 {

// What there is to score and to select for row m. In shared memory, to spare registers.
__device__ inline void describe_row(const Params& params, int64_t m, const Row& row,
                                    GroupRow& found) {
  const RowsParams& rows = params.rows;
  found.stage = {};
  found.stage.last = true;
  found.kept = 0;
  if (!row.empty() && params.work == Work::kFlat) {
    found.stage = token_stage(rows, m, row, 0, nullptr);
  } else if (!row.empty()) {
    const int shift = rows.block_shift;
    const int64_t first = (row.start - row.origin) >> shift;
    const int64_t last = (row.end - 1 - row.origin) >> shift;
    int32_t* blocks = params.kept + m * rows.kept;
    found.pruned = last - first >= rows.block_topk;
    found.kept = count_kept(rows, row);
    found.first = static_cast<int32_t>(row.origin + (first << shift));
    found.last = static_cast<int32_t>(row.origin + (last << shift));
    if (is_refine(params.work))
      found.stage = token_stage(rows, m, row, found.kept, blocks);
    else if (found.pruned && found.kept > 2)
      found.stage = coarse_stage(rows, row, first, last, blocks);
  }
  found.scored = found.stage.scores != nullptr || found.stage.count < found.stage.source.size;
}

// Load every kLoaders-th group.
template <class C>
__device__ void load_groups(const Params& params, const Memory<C>& memory, uint32_t loader) {
  Shared<C>& shared = memory.shared;
  const RowsParams& rows = params.rows;
  const Queries& queries = rows.queries;
  const int lane = static_cast<int>(threadIdx.x % 32);
  Turn turn{params.groups};
  for (uint32_t i = 0; i < loader; ++i) turn.next();
  uint32_t number = loader;  // of the group
  for (int64_t g = last_group<C>(params) - int64_t{loader} * gridDim.x; g >= 0;
       g -= C::kLoaders * gridDim.x) {
    const int64_t m = g * C::kGroup;
    Row row{};
    if (lane < C::kGroup && m + lane < queries.rows)
      row = find_row(rows.windows, m + lane, rows.keys.count);

    shared.group_empty[turn.buffer].wait(turn.phase ^ 1U);
    Group<C>& group = shared.groups[turn.buffer];
    bool huge = false;
#pragma unroll 1
    for (int i = lane; i < C::kColumns; i += 32) {
      const int64_t of = m + i / C::kHeads;
      const float weight =
          of < queries.rows ? queries.weights[of * queries.weights_stride + i % C::kHeads] : 0.0F;
      group.weights[i] = weight;
      huge = huge || fabsf(weight) > kMostWeight;
    }
    huge = __ballot_sync(~0U, huge) != 0;
    uint32_t base = ~0U;
    uint32_t end = 0;
    if (lane < C::kGroup) {
      GroupRow& mine = group.rows[lane];
      describe_row(params, m + lane, row, mine);
      if (mine.scored) {
        base = is_refine(params.work) ? 0 : mine.stage.source.first;
        end = mine.stage.source.first + mine.stage.source.size;
      }
    }
    base = __reduce_min_sync(~0U, base);
    end = __reduce_max_sync(~0U, end);
    const bool scored = end > 0;
    if (lane < C::kGroup) {
      GroupRow& mine = group.rows[lane];
      mine.shift = mine.scored ? mine.stage.source.first - base : 0;
    }
    if (lane == 0) {
      group.m = m;
      group.huge = huge;
      group.size = scored ? end - base : 0;
      constexpr uint32_t kKeys = C::kSpan * C::kTile;
      group.tiles = (group.size + kKeys - 1) / kKeys * C::kSpan;
      group.base = base;
      const uint32_t first =
          params.work == Work::kRefine ? static_cast<uint32_t>(group.rows[0].first) : base;
      group.scale_shift = (first + params.scale_offset) & 3U;
      group.blocks = params.work == Work::kRefine ? params.kept + m * rows.kept : nullptr;
    }
    __syncwarp();
    if constexpr (C::kPairs) pair_blocks(params, group);
    if constexpr (C::kTight) {
      shared.group_full[turn.buffer].arrive();
      // NOTE: those of the group before the last are done, as its buffer was waited for; so the
      // barrier cannot be two phases behind, which it would not tell.
      static_assert(C::kGroups == 2);
      shared.queries_empty.wait((number & 1U) ^ 1U);
      number += C::kLoaders;
    }
    ptx::Barrier& full = C::kTight ? shared.queries_full : shared.group_full[turn.buffer];
    char* const to = memory.queries + (C::kTight ? 0 : turn.buffer * Memory<C>::kQueryBytes);
    if (!scored) {
      full.arrive();
    } else {
      full.arrive_and_expect(C::kColumns * C::kRowBytes);
      for (int panel = 0; lane == 0 && panel < C::kPanels; ++panel)
        ptx::copy_box(to + panel * C::kColumns * C::kPitch, params.queries, full,
                      panel * C::kPitch / C::kElement, 0, static_cast<int32_t>(m));
    }
    __syncwarp();
    for (int i = 0; i < C::kLoaders; ++i) turn.next();
  }
}

// The page that holds a key of a paged call. A page that is none is never read, nor is one of a key
// behind the last: the copy engine brings zeros.
__device__ __forceinline__ int32_t find_page(const PageMap& map, int32_t key) {
  const uint32_t sequence = static_cast<uint32_t>(key) / map.room;
  const uint32_t page = (static_cast<uint32_t>(key) - sequence * map.room) >> map.page_shift;
  if (sequence >= map.sequences || page >= map.width) return map.pages;
  const int32_t id = map.ids[sequence * map.stride + page];
  return id < 0 ? map.pages : id;
}

// Copy every kCopiers-th tile, each of them a single box. All lanes know the same, and the compiler
// knows that they do, so that there is little to be done for a tile.
template <class C>
__device__ void copy_whole_tiles(const Params& params, const Memory<C>& memory, uint32_t copier) {
  static_assert(C::kPanels == 1);
  Shared<C>& shared = memory.shared;
  const bool scaled = params.scored.scale != nullptr;
  const uint32_t bytes = Memory<C>::kTileBytes + (scaled ? C::kBoxes.scales * 4 : 0);
  const auto outside = static_cast<int32_t>(params.scored.count);  // a box of zeros
  uint32_t stage = copier;
  uint32_t phase = 1;
  uint32_t tile = copier;  // of the group
  Turn turn{params.groups};
  for (int64_t g = last_group<C>(params); g >= 0; g -= gridDim.x, turn.next()) {
    shared.group_full[turn.buffer].wait(turn.phase);
    const Group<C>& group = shared.groups[turn.buffer];
    const uint32_t tiles = __shfl_sync(~0U, group.tiles, 0);
    const uint32_t size = __shfl_sync(~0U, group.size, 0);
    const uint32_t base = __shfl_sync(~0U, group.base, 0);
    for (; tile < tiles; tile += C::kCopiers) {
      int32_t key = outside;
      if constexpr (C::kPairs)
        key = __shfl_sync(~0U, group.pair.tiles[tile].first, 0);
      else if (tile * C::kTile < size)
        key = static_cast<int32_t>(base + tile * C::kTile);
      shared.tile_empty[stage].wait(phase);
      ptx::Barrier& full = shared.tile_full[stage];
      full.arrive_and_expect(bytes);
      if (ptx::elect()) {
        ptx::copy_box(memory.keys + stage * Memory<C>::kTileBytes, params.keys, full, 0, key);
        if (scaled)
          ptx::copy_box(memory.scale + stage * C::kBoxes.tile, params.scale, full,
                        static_cast<int32_t>((key + params.scale_offset) & ~3U));
      }
      stage += C::kCopiers;
      if (stage >= C::kStageStep) {
        stage -= C::kStageStep;
        phase ^= 1U;
      }
    }
    tile -= tiles;
    shared.group_empty[turn.buffer].arrive();
  }
}

// Copy every kCopiers-th tile, in boxes: of the row's blocks, or the whole of it.
template <class C>
__device__ void copy_tiles(const Params& params, const Memory<C>& memory, uint32_t copier) {
  Shared<C>& shared = memory.shared;
  const uint32_t lane = threadIdx.x % 32;
  const int shift = params.rows.block_shift;
  const Boxes boxes = params.boxes;
  const uint32_t scale_bytes = params.scored.scale != nullptr ? boxes.number * boxes.scales * 4 : 0;
  const auto outside = static_cast<int32_t>(params.scored.count);  // a box of zeros
  uint32_t stage = copier;
  uint32_t phase = 0;
  uint32_t first = copier;  // of the group's tiles, the first one to copy
  Turn turn{params.groups};
  for (int64_t g = last_group<C>(params); g >= 0; g -= gridDim.x, turn.next()) {
    shared.group_full[turn.buffer].wait(turn.phase);
    const Group<C>& group = shared.groups[turn.buffer];
    const uint32_t tiles = group.tiles;
    const uint32_t size = lane < boxes.number ? C::kPairs ? tiles * C::kTile : group.size : 0;
    const uint32_t base = group.base;
    const int32_t* blocks = group.blocks;
    uint32_t at = first * C::kTile + lane * boxes.keys;  // the lane's box, of the group's keys
    // What the box's first key is made from; it takes a while to come.
    const auto find_block = [&] {
      if (at >= size) return outside;
      if constexpr (C::kPairs) return group.pair.tiles[at / C::kTile].first;
      return blocks == nullptr ? static_cast<int32_t>(base) : blocks[at >> shift];
    };
    const uint32_t inside = C::kPairs ? 0 : blocks == nullptr ? ~0U : (1U << shift) - 1;
    int32_t block = find_block();
    uint32_t tile = first;
    for (; tile < tiles; tile += C::kCopiers) {
      const int32_t key = block + (at < size ? static_cast<int32_t>(at & inside) : 0);
      at += C::kCopiers * C::kTile;
      block = find_block();
      shared.tile_empty[stage].wait(phase ^ 1U);
      ptx::Barrier& full = shared.tile_full[stage];
      full.arrive_and_expect(Memory<C>::kTileBytes + scale_bytes);
      if (lane < boxes.number) {
        char* to = memory.keys + stage * Memory<C>::kTileBytes + lane * boxes.keys * C::kPitch;
        if constexpr (C::kPages) {
          const auto inside_page =
              static_cast<int32_t>(key & ((1U << params.pages.page_shift) - 1));
          const int32_t page = find_page(params.pages, key);
          for (int panel = 0; panel < C::kPanels; ++panel)
            ptx::copy_box(to + panel * C::kTile * C::kPitch, params.keys, full,
                          panel * C::kPitch / C::kElement, inside_page, page);
          if (scale_bytes > 0)
            ptx::copy_box(memory.scale + stage * boxes.tile + lane * boxes.pitch, params.scale,
                          full, inside_page, page);
        } else {
          for (int panel = 0; panel < C::kPanels; ++panel)
            ptx::copy_box(to + panel * C::kTile * C::kPitch, params.keys, full,
                          panel * C::kPitch / C::kElement, key);
          if (scale_bytes > 0)
            ptx::copy_box(memory.scale + stage * boxes.tile + lane * boxes.pitch, params.scale,
                          full, static_cast<int32_t>((key + params.scale_offset) & ~3U));
        }
      }
      stage += C::kCopiers;
      if (stage >= static_cast<uint32_t>(params.stages)) {
        stage -= params.stages;
        phase ^= 1U;
      }
    }
    first = tile - tiles;
    shared.group_empty[turn.buffer].arrive();
  }
}

}  // namespace hisa::cuda::sm90
