// The warpgroups that multiply and score:
//   score(n) = scale[n] * sum_h weights[h] * relu(dot(q[h], k[n]))
//
// Keys are the rows of a product, the heads of a group's rows its columns. So the sum over heads is
// inside a thread, but for four lanes. A product is one of 64 keys; a tile is one, or two.
//
// The order of the sum over heads is fixed, see products.cuh: a key's score depends neither on its
// place in a tile nor on the keys or rows beside it.
#pragma once

#include "products.cuh"
#include "shared.cuh"

namespace hisa::cuda::sm90 {

// Where kRows rows are scored together, a warp has two sums of each, of keys g and g + 8 (g as
// above, lane / 4). A lane stores kOwn of them.
template <int kRows>
struct Own {
  static constexpr int kSums = 2 * kRows;
  static constexpr int kOwn = kSums > 4 ? kSums / 4 : 1;

  uint32_t out[kOwn];  // where the score goes, for a product whose first key is at position 0
  int32_t least[kOwn];  // that position, where the score is wanted
  uint32_t scale[kOwn];  // where the key's scale is in a tile; in a span's first one, its address
  float bar[kOwn];  // of the row: what does not pass it is not wanted
  uint32_t marks;  // where the warp's marks go, likewise

  __device__ static int number(int i) {
    const int c = static_cast<int>(threadIdx.x % 4);
    return kSums == 2 ? c / 2 : c * kOwn + i;
  }
  __device__ static int row(int i) { return number(i) / 2; }
  __device__ static int key(int i) {  // of the product's 64
    return static_cast<int>(threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4) + number(i) % 2 * 8;
  }
  __device__ static bool stores() { return kSums > 2 || threadIdx.x % 2 == 0; }
};

template <class C>
class Scorer {
 public:
  __device__ Scorer(const Params& params, const Memory<C>& memory)
      : params_(params),
        memory_(memory),
        // The same in all lanes, and the compiler knows.
        scorer_(__shfl_sync(~0U, threadIdx.x / 128, 0) - 2),
        tile_(scorer_ * C::kSpan),
        stage_(scorer_ * C::kSpan),
        chunk_turn_{params.chunks},
        keys_(ptx::shared_address(memory.keys)) {}

  __device__ void run() {
    Shared<C>& shared = memory_.shared;
    Turn group_turn{params_.groups};
    Turn query_turn{1};
    for (int64_t g = last_group<C>(params_); g >= 0; g -= gridDim.x, group_turn.next()) {
      shared.group_full[group_turn.buffer].wait(group_turn.phase);
      const Group<C>& group = shared.groups[group_turn.buffer];
      const uint32_t tiles = __shfl_sync(~0U, group.tiles, 0);
      queries_ = ptx::shared_address(memory_.queries);
      if constexpr (C::kTight)
        shared.queries_full.wait(query_turn.phase);
      else
        queries_ += group_turn.buffer * Memory<C>::kQueryBytes;
      if constexpr (C::kPairs)
        score_pair(group, tiles);
      else if (params_.rows.capacity > 0)
        score_chunks<true>(group, tiles);
      else
        score_chunks<false>(group, tiles);
      group_tile_ += tiles;
      if constexpr (C::kTight) {
        shared.queries_empty.arrive();
        query_turn.next();
      }
      shared.group_empty[group_turn.buffer].arrive();
    }
  }

 private:
  // Rows that are scored against the same keys, chunk by chunk, and marked if there are several.
  template <bool kMarked>
  __device__ __forceinline__ void score_chunks(const Group<C>& group, uint32_t tiles) {
    constexpr int kRows = C::kGroup;
    const uint32_t chunk_tiles = static_cast<uint32_t>(params_.rows.chunk) / C::kTile;
    load_weights<kRows>(group, 0);
    for (uint32_t begin = 0; begin < tiles; begin += chunk_tiles, chunk_turn_.next()) {
      memory_.shared.chunk_empty[chunk_turn_.buffer].wait(chunk_turn_.phase ^ 1U);
      Own<kRows> own;
#pragma unroll
      for (int i = 0; i < Own<kRows>::kOwn; ++i) {
        const int row = own.row(i);
        set_own(own, i, row, max(group.rows[row].shift, begin * C::kTile), group.scale_shift);
        own.bar[i] = memory_.shared.bars[chunk_turn_.buffer][row];
      }
      own.marks = ptx::shared_address(memory_.chunk_marks(chunk_turn_.buffer, params_.rows.chunk)) +
                  (threadIdx.x % 128 / 32 - begin * C::kTile / 16) * 4 * Memory<C>::kMarkWords;
      score_tiles<kMarked>(own, queries_, min(begin + chunk_tiles, tiles),
                           [&](uint32_t tile) { return tile * C::kTile; });
      memory_.shared.chunk_full[chunk_turn_.buffer].arrive();
    }
  }

  // Two rows: the tiles that they have in common, then those of each.
  __device__ __forceinline__ void score_pair(const Group<C>& group, uint32_t tiles) {
    if (tiles == 0) return;
    Shared<C>& shared = memory_.shared;
    shared.chunk_empty[chunk_turn_.buffer].wait(chunk_turn_.phase ^ 1U);
    first_chunk_ = chunk_turn_.buffer;
    if constexpr (C::kTight) {
      chunk_turn_.next();
      shared.chunk_empty[chunk_turn_.buffer].wait(chunk_turn_.phase ^ 1U);
    }
    score_kind<2>(group, 0, 0);
#pragma unroll 1
    for (int row = 0; row < 2; ++row) {
      score_kind<1>(group, row, row + 1);
      if (C::kTight && row == 0) shared.chunk_full[first_chunk_].arrive();
    }
    shared.chunk_full[chunk_turn_.buffer].arrive();
    chunk_turn_.next();
  }

  // Tiles of one kind, for kRows of the pair's rows from `first` on.
  template <int kRows>
  __device__ __forceinline__ void score_kind(const Group<C>& group, int first, int kind) {
    const Pair& pair = group.pair;
    const uint32_t end = __shfl_sync(~0U, pair.ends[kind], 0);
    if (static_cast<int32_t>(tile_ - group_tile_ - end) >= 0) return;
    load_weights<kRows>(group, first);
    Own<kRows> own;
    const int row = first + own.row(0);
    set_own(own, 0, row, group.rows[row].shift, pair.scale_shift[first]);
    score_tiles<false>(own, queries_ + first * C::kHeads * C::kPitch, end,
                       [&](uint32_t tile) { return uint32_t{pair.tiles[tile].position[row]}; });
  }

  template <int kRows>
  __device__ __forceinline__ void load_weights(const Group<C>& group, int first) {
    const int c = static_cast<int>(threadIdx.x % 4);
    const auto* pairs = reinterpret_cast<const float2*>(group.weights + first * C::kHeads);
#pragma unroll
    for (int i = 0; i < kRows * kRowPairs; ++i) {
      const float2 pair = pairs[4 * i + c];
      weights_[2 * i] = pair.x;
      weights_[2 * i + 1] = pair.y;
    }
    huge_ = __shfl_sync(~0U, group.huge, 0);
    if (kIsWide<kRows> && !huge_) raise(weights_);
  }

  // Of a row whose scores from position `skipped` on are wanted.
  template <int kRows>
  __device__ __forceinline__ void set_own(Own<kRows>& own, int i, int row, uint32_t skipped,
                                          uint32_t scale_shift) const {
    const Boxes& boxes = params_.boxes;
    const auto key = static_cast<uint32_t>(own.key(i));
    own.least[i] = static_cast<int32_t>(skipped - key);
    const uint32_t chunk = C::kTight && row == 0 ? first_chunk_ : chunk_turn_.buffer;
    own.out[i] = ptx::shared_address(memory_.chunk(chunk, row, params_.rows.chunk)) -
                 static_cast<uint32_t>(own.least[i]) * 4;
    if constexpr (C::kSpan == 2)
      own.scale[i] =
          ptx::shared_address(memory_.scale + stage_ * C::kBoxes.tile + scale_shift + key);
    else
      own.scale[i] = scale_shift + key / boxes.keys * boxes.pitch + key % boxes.keys;
  }

  // NOTE: threads read the scales, the copy engine writes the next ones there, and only a fence
  // keeps the two in order. Without it now and then a key had the scale of the stage's next tile.
  __device__ __forceinline__ void release(uint32_t stage) {
    ptx::fence_async();
    memory_.shared.tile_empty[stage].arrive();
  }

  // Go on to the scorer's next span.
  __device__ __forceinline__ void next() {
    tile_ += C::kSpan * C::kScorers;
    if constexpr (C::kSpan == 2) {
      phase_ ^= 1U;
    } else {
      stage_ += C::kScorers;
      if (stage_ >= static_cast<uint32_t>(params_.stages)) {
        stage_ -= params_.stages;
        phase_ ^= 1U;
      }
    }
  }
  // That of a tile of the span at hand.
  __device__ __forceinline__ uint32_t stage(int tile) const {
    return C::kSpan == 2 ? stage_ + tile : stage_;
  }

  // The group's tiles before `end`, of which `position` tells that of the first key.
  template <bool kMarked, int kRows, class Position>
  __device__ __forceinline__ void score_tiles(const Own<kRows>& own, uint32_t queries, uint32_t end,
                                              Position position) {
    const auto left = [&] { return static_cast<int32_t>(group_tile_ + end - tile_); };
    if constexpr (kIsWide<kRows>) {
      if (huge_)
        while (left() > 0) score_span<kMarked, false>(own, queries, position);
      else
        while (left() > 0) score_span<kMarked, true>(own, queries, position);
    } else {
      while (left() > (C::kRun - C::kSpan) * C::kScorers)
        score_run<C::kRun, kMarked>(own, queries, position);
      if constexpr (C::kRun > C::kSpan)
        while (left() > 0) score_run<C::kSpan, kMarked>(own, queries, position);
    }
  }

  // A span of tiles, each a single product. While it is added up, other scorers multiply.
  template <bool kMarked, bool kRaised, int kRows, class Position>
  __device__ __forceinline__ void score_span(const Own<kRows>& own, uint32_t queries,
                                             Position position) {
    static_assert(C::kParts == 1 && C::kSpan == 2);
    Shared<C>& shared = memory_.shared;
    const uint32_t first = tile_ - group_tile_;
#pragma unroll
    for (int tile = 0; tile < C::kSpan; ++tile) {
      const uint32_t at = stage(tile);
      float dots[kRows * C::kHeads / 2];
      float scale[Own<kRows>::kOwn];
      shared.tile_full[at].wait(phase_);
      multiply<C>(dots, part(at, 0), queries);
      const auto key = static_cast<int32_t>(position(first + tile));
      load_scales(own, tile, 0, scale);
      ptx::wait_for_products<0>();
      release(at);
      add_up<kMarked, kRaised>(dots, scale, key, own);
    }
    next();
  }

  // kTiles tiles. While one product is added up, the next one is under way.
  template <int kTiles, bool kMarked, int kRows, class Position>
  __device__ __forceinline__ void score_run(const Own<kRows>& own, uint32_t queries,
                                            Position position) {
    constexpr int kProducts = kTiles * C::kParts;
    constexpr int kStep = C::kSpan == 2 ? 1 : C::kScorers;  // from a tile of the run to the next
    Shared<C>& shared = memory_.shared;
    float dots[2][kRows * C::kHeads / 2];
    const uint32_t first = tile_ - group_tile_;
    shared.tile_full[stage(0)].wait(phase_);
    multiply<C>(dots[0], part(stage(0), 0), queries);
#pragma unroll
    for (int i = 0; i < kProducts; ++i) {
      const int tile = i / C::kParts;
      const int number = i % C::kParts;
      const bool last = number + 1 == C::kParts;  // of the tile
      const uint32_t at = stage(tile);
      const auto key = static_cast<int32_t>(position(first + tile * kStep) + number * 64);
      float scale[Own<kRows>::kOwn];
      load_scales(own, tile, number, scale);
      if (last && (C::kSpan == 1 || tile + 1 == kTiles)) next();
      if (i + 1 < kProducts) {
        const uint32_t following = last ? stage(tile + 1) : at;
        if (last) shared.tile_full[following].wait(phase_);
        multiply<C>(dots[(i + 1) % 2], part(following, (i + 1) % C::kParts), queries);
        ptx::wait_for_products<1>();
      } else {
        ptx::wait_for_products<0>();
      }
      if (last) release(at);
      add_up<kMarked, false>(dots[i % 2], scale, key, own);
    }
  }

  // Of the keys of a product of a tile of a run, whose scores the lane stores.
  template <int kRows>
  __device__ void load_scales(const Own<kRows>& own, int tile, int number,
                              float (&scale)[Own<kRows>::kOwn]) const {
#pragma unroll
    for (int i = 0; i < Own<kRows>::kOwn; ++i)
      if constexpr (C::kSpan == 2)
        scale[i] = ptx::load<float>(own.scale[i] + tile * C::kBoxes.tile * 4);
      else
        scale[i] =
            memory_.scale[stage_ * params_.boxes.tile + number * params_.boxes.half + own.scale[i]];
  }

  __device__ uint32_t part(uint32_t stage, int number) const {
    return keys_ + stage * Memory<C>::kTileBytes + number * 64 * C::kPitch;
  }

  // Scores of 64 keys, from their dot products; the first key's position.
  template <bool kMarked, bool kRaised, int kRows>
  __device__ __forceinline__ void add_up(float (&dots)[kRows * C::kHeads / 2],
                                         const float (&scale)[Own<kRows>::kOwn], int32_t position,
                                         const Own<kRows>& own) const {
    constexpr int kSums = Own<kRows>::kSums;
    ptx::pin(dots);
    float sums[kSums];
    weigh<C::kHeads, kRows>(weights_, dots, sums, kRaised);
    fold<kSums, 2>(sums);
    fold<(kSums + 1) / 2, 1>(sums);
#pragma unroll
    for (int i = 0; i < Own<kRows>::kOwn; ++i) {
      const float score = sums[i] * scale[i];
      ptx::store_if(own.stores() && position >= own.least[i],
                    own.out[i] + static_cast<uint32_t>(position) * 4, score);
      // A bit of each lane: of the 16 keys of the warp, and the rows, see Own::number().
      if constexpr (kMarked) {
        const uint32_t passing = __ballot_sync(~0U, !(score <= own.bar[i]));
        ptx::store_if(threadIdx.x % 32 == 0,
                      own.marks + (static_cast<uint32_t>(position) / 16 * Own<kRows>::kOwn + i) * 4,
                      passing);
      }
    }
  }

  static constexpr int kRowPairs = C::kHeads / 8;  // of a row's columns that a lane has of a key
  template <int kRows>
  static constexpr bool kIsWide = C::kWide && kRows * C::kHeads > 64;

  const Params& params_;
  const Memory<C>& memory_;
  const uint32_t scorer_;
  uint32_t tile_;  // the next one to score, of all tiles of this block of threads
  uint32_t stage_;
  uint32_t phase_ = 0;
  uint32_t group_tile_ = 0;  // the group's first
  Turn chunk_turn_;
  uint32_t first_chunk_ = 0;  // kTight: that of the first row; the second one's is chunk_turn_
  const uint32_t keys_;  // all stages, in shared memory
  uint32_t queries_;  // of the group
  bool huge_ = false;
  float weights_[C::kColumns / 4];
};

}  // namespace hisa::cuda::sm90
