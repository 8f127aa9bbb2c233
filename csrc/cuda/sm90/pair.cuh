// Two rows that are refined together: neighbours in a prefill keep mostly the same blocks. What
// both keep is multiplied once, with the heads of both as columns; the rest by row. No score
// depends on it.
#pragma once

#include <bit>

#include "shared.cuh"

namespace hisa::cuda::sm90 {

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
    const uint32_t listed = group.rows[row].kept;
    kept[row] = group.rows[row].scored ? listed : 0;
    const int32_t* blocks = params.kept + (group.m + row) * params.rows.kept;
#pragma unroll
    for (int i = 0; i < kLists; ++i) {
      const uint32_t slot = i * 32 + lane;
      const int32_t block = slot < listed ? blocks[slot] : -1;
      group.pair.blocks[row][slot] = block;
      mine[row][i] = slot < kept[row] ? block : -1 - row;  // of no other row
    }
    if (lane == 0) group.rows[row].stage.source.blocks = group.pair.blocks[row];
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

  Pair& pair = group.pair;
  const int shift = params.rows.block_shift;
  const int tiles = shift - std::countr_zero(static_cast<uint32_t>(C::kTile));  // of a block, log2
  uint32_t blocks[3] = {0, kept[0], kept[1]};  // of each kind
#pragma unroll
  for (int i = 0; i < kLists; ++i) blocks[0] += static_cast<uint32_t>(__popc(common[i]));
  blocks[1] -= blocks[0], blocks[2] -= blocks[0];
  static_assert(2 * kPairBlocks + 3 * (C::kSpan - 1) <= 2 * kPairTiles, "a tile a block");
  uint32_t next[3];  // tile of each kind
  uint32_t end = 0;
#pragma unroll
  for (int kind = 0; kind < 3; ++kind) {
    next[kind] = end;
    end += ((blocks[kind] << tiles) + C::kSpan - 1) / C::kSpan * C::kSpan;
    if (lane == 0) pair.ends[kind] = end;
  }
  const auto add = [&](bool wanted, int kind, int32_t first, int32_t slot0, int32_t slot1) {
    const uint32_t wanting = __ballot_sync(~0U, wanted);
    const auto number = static_cast<uint32_t>(__popc(wanting));
    const uint32_t at = next[kind] + (static_cast<uint32_t>(__popc(wanting & before)) << tiles);
    for (int tile = 0; wanted && tile < 1 << tiles; ++tile) {
      const int32_t inside = tile * C::kTile;
      pair.tiles[at + tile] = {first + inside,
                               {static_cast<uint16_t>((slot0 << shift) + inside),
                                static_cast<uint16_t>((slot1 << shift) + inside)}};
    }
    next[kind] += number << tiles;
  };
#pragma unroll
  for (int i = 0; i < kLists; ++i) {
    const int32_t slot = i * 32 + static_cast<int32_t>(lane);
    add(same[i] >= 0, 0, mine[0][i], slot, same[i]);
    add(same[i] < 0 && mine[0][i] >= 0, 1, mine[0][i], slot, 0);
    add((common[i] >> lane & 1) == 0 && mine[1][i] >= 0, 2, mine[1][i], 0, slot);
  }
  if (lane < 2)
    pair.scale_shift[lane] =
        (static_cast<uint32_t>(group.rows[lane].first) + params.scale_offset) & 3U;
  __syncwarp();
  // Where a span lacks a tile, its last one is scored again: the same scores, to the same places.
  if (lane == 0) {
    group.tiles = end;
#pragma unroll
    for (int kind = 0; kind < 3; ++kind)
      if (next[kind] < pair.ends[kind]) pair.tiles[next[kind]] = pair.tiles[next[kind] - 1];
  }
  __syncwarp();
}

}  // namespace hisa::cuda::sm90
