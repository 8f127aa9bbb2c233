// The warps that bring a group's queries and keys to shared memory.
#pragma once

#include <bit>

#include "../coarse.cuh"
#include "../ptx/tensor_copy.cuh"
#include "../refine.cuh"
#include "shared.cuh"

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
    found.kept = static_cast<uint32_t>(min(rows.block_topk, last - first + 1));
    found.first = static_cast<int32_t>(row.origin + (first << shift));
    found.last = static_cast<int32_t>(row.origin + (last << shift));
    if (is_refine(params.work))
      found.stage = token_stage(rows, m, row, found.kept, blocks);
    else if (found.pruned && found.kept > 2)
      found.stage = coarse_stage(rows, row, first, last, blocks);
  }
  found.scored = found.stage.scores != nullptr || found.stage.count < found.stage.source.size;
}

// Find the blocks that both rows of a pair have, and those that one has alone. All lanes call it.
template <class C>
__device__ void pair_blocks(const Params& params, Group<C>& group) {
  constexpr int kLists = kPairBlocks / 32;  // blocks of a row that a lane looks after
  const uint32_t lane = threadIdx.x % 32;
  const uint32_t before = (1U << lane) - 1;
  uint32_t kept[2];
  int32_t mine[2][kLists];
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    kept[row] = group.rows[row].scored ? group.rows[row].kept : 0;
    const int32_t* blocks = params.kept + (group.m + row) * params.rows.kept;
#pragma unroll
    for (int i = 0; i < kLists; ++i) {
      const uint32_t slot = i * 32 + lane;
      mine[row][i] = slot < kept[row] ? blocks[slot] : -1 - row;  // of no other row
    }
  }
  // Which of the second row's blocks a lane's own ones are, and which of them are anyone's.
  int32_t same[kLists];
  uint32_t common[kLists] = {};
#pragma unroll
  for (int i = 0; i < kLists; ++i) same[i] = -1;
#pragma unroll
  for (int i = 0; i < kLists; ++i)
#pragma unroll 4
    for (int j = 0; j < 32; ++j) {
      const int32_t other = __shfl_sync(~0U, mine[1][i], j);
      bool found = false;
#pragma unroll
      for (int k = 0; k < kLists; ++k)
        if (mine[0][k] == other) same[k] = i * 32 + j, found = true;
      common[i] |= __ballot_sync(~0U, found) != 0 ? 1U << j : 0U;
    }

  uint32_t ends[3] = {0, kept[0], kept[0] + kept[1]};  // blocks, of each kind and those before
#pragma unroll
  for (int i = 0; i < kLists; ++i) ends[0] += static_cast<uint32_t>(__popc(common[i]));
  ends[2] -= ends[0];
  Pair& pair = group.pair;
  const int shift = params.rows.block_shift;
  const int tiles = shift - std::countr_zero(static_cast<uint32_t>(C::kTile));  // of a block, log2
  uint32_t next[3] = {0, ends[0], ends[1]};
  const auto add = [&](bool wanted, int kind, int32_t first, int32_t slot0, int32_t slot1) {
    const uint32_t wanting = __ballot_sync(~0U, wanted);
    const uint32_t at = next[kind] + static_cast<uint32_t>(__popc(wanting & before));
    for (int tile = 0; wanted && tile < 1 << tiles; ++tile) {
      const int32_t inside = tile * C::kTile;
      pair.tiles[(at << tiles) + tile] = {first + inside,
                                          {static_cast<uint16_t>((slot0 << shift) + inside),
                                           static_cast<uint16_t>((slot1 << shift) + inside)}};
    }
    next[kind] += static_cast<uint32_t>(__popc(wanting));
  };
#pragma unroll
  for (int i = 0; i < kLists; ++i) {
    const int32_t slot = i * 32 + static_cast<int32_t>(lane);
    add(same[i] >= 0, 0, mine[0][i], slot, same[i]);
    add(same[i] < 0 && mine[0][i] >= 0, 1, mine[0][i], slot, 0);
    add((common[i] >> lane & 1) == 0 && mine[1][i] >= 0, 2, mine[1][i], 0, slot);
  }
  if (lane < 3) pair.ends[lane] = (lane == 0 ? ends[0] : lane == 1 ? ends[1] : ends[2]) << tiles;
  if (lane < 2)
    pair.scale_shift[lane] =
        static_cast<uint32_t>(group.rows[lane].first) + params.scale_offset & 3U;
  if (lane == 0) group.tiles = ends[2] << tiles;
  __syncwarp();
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
  for (int64_t g = last_group<C>(params) - int64_t{loader} * gridDim.x; g >= 0;
       g -= C::kLoaders * gridDim.x) {
    const int64_t m = g * C::kGroup;
    Row row{};
    if (lane < C::kGroup && m + lane < queries.rows)
      row = find_row(rows.windows, m + lane, rows.keys.count);

    shared.group_empty[turn.buffer].wait(turn.phase ^ 1U);
    Group<C>& group = shared.groups[turn.buffer];
#pragma unroll 1
    for (int i = lane; i < C::kColumns; i += 32) {
      const int64_t of = m + i / C::kHeads;
      group.weights[i] =
          of < queries.rows ? queries.weights[of * queries.weights_stride + i % C::kHeads] : 0.0F;
    }
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
      group.size = scored ? end - base : 0;
      group.tiles = (group.size + C::kTile - 1) / C::kTile;
      group.base = base;
      const uint32_t first =
          params.work == Work::kRefine ? static_cast<uint32_t>(group.rows[0].first) : base;
      group.scale_shift = first + params.scale_offset & 3U;
      group.blocks = params.work == Work::kRefine ? params.kept + m * rows.kept : nullptr;
    }
    __syncwarp();
    if constexpr (C::kPairs) pair_blocks(params, group);
    ptx::Barrier& full = shared.group_full[turn.buffer];
    if (lane == 0 && !scored) full.arrive();
    if (lane == 0 && scored) {
      full.arrive_and_expect(C::kColumns * C::kRowBytes);
      for (int panel = 0; panel < C::kPanels; ++panel)
        ptx::copy_box(
            memory.queries + turn.buffer * Memory<C>::kQueryBytes + panel * C::kColumns * C::kPitch,
            params.queries, full, panel * C::kPitch / C::kElement, 0, static_cast<int32_t>(m));
    }
    __syncwarp();
    for (int i = 0; i < C::kLoaders; ++i) turn.next();
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
      if (lane == 0) full.arrive_and_expect(Memory<C>::kTileBytes + scale_bytes);
      __syncwarp();
      if (lane < boxes.number) {
        char* to = memory.keys + stage * Memory<C>::kTileBytes + lane * boxes.keys * C::kPitch;
        for (int panel = 0; panel < C::kPanels; ++panel)
          ptx::copy_box(to + panel * C::kTile * C::kPitch, params.keys, full,
                        panel * C::kPitch / C::kElement, key);
        if (scale_bytes > 0)
          ptx::copy_box(memory.scale + stage * boxes.tile + lane * boxes.pitch, params.scale, full,
                        static_cast<int32_t>(key + params.scale_offset & ~3U));
      }
      stage += C::kCopiers;
      if (stage >= static_cast<uint32_t>(params.stages)) {
        stage -= params.stages;
        phase ^= 1U;
      }
    }
    first = tile - tiles;
    __syncwarp();
    if (lane == 0) shared.group_empty[turn.buffer].arrive();
  }
}

}  // namespace hisa::cuda::sm90
