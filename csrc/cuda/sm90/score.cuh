// The warpgroups that multiply and score:
//   score(n) = scale[n] * sum_h weights[h] * relu(dot(q[h], k[n]))
//
// Keys are the rows of a product, the heads of a group's rows its columns. So the sum over heads is
// inside a thread, but for four lanes. A tile is two products of 64 keys each.
//
// Order of the sum over heads, fixed: with c = lane % 4, a lane adds heads 2c, 2c + 8, 2c + 16, ..
// one fused multiply-add after another, and likewise 2c + 1, 2c + 9, ..; then both; then lanes
// whose c differ by 2, by 1. The key's scale comes last. A key's score depends neither on its place
// in a tile nor on the keys or rows beside it.
#pragma once

#include "../ptx/shared.cuh"
#include "../ptx/wgmma.cuh"
#include "shared.cuh"

namespace hisa::cuda::sm90 {

template <class C>
__device__ __forceinline__ void multiply_step(float (&d)[C::kColumns / 2], uint64_t a, uint64_t b,
                                              bool add) {
  if constexpr (C::kType == ElementType::kFloat8E4M3)
    ptx::wgmma_e4m3(d, a, b, add);
  else
    ptx::wgmma_bf16(d, a, b, add);
}

// Begin the dot products of 64 keys with all columns.
template <class C>
__device__ __forceinline__ void multiply(float (&d)[C::kColumns / 2], const char* keys,
                                         const char* queries) {
  ptx::pin(d);
  ptx::fence_products();
#pragma unroll
  for (int panel = 0; panel < C::kPanels; ++panel) {
    const uint64_t a = ptx::describe<C::kPitch>(keys + panel * kTile * C::kPitch);
    const uint64_t b = ptx::describe<C::kPitch>(queries + panel * C::kColumns * C::kPitch);
#pragma unroll
    for (int step = 0; step < C::kSteps; ++step)
      multiply_step<C>(d, a + step * 2, b + step * 2, panel + step > 0);
  }
  ptx::commit_products();
}

// Add up the four lanes of each value; they go on with half of the values each, as long as there
// are several. Lane c of four has values c * kCount / 4 on, or c * kCount / 4 rounded down.
template <int kCount, int kMask>
__device__ __forceinline__ void fold(float* values) {
  const bool high = (threadIdx.x & kMask) != 0;
  if constexpr (kCount == 1) {
    values[0] += __shfl_xor_sync(~0U, values[0], kMask);
  } else {
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) {
      const float mine = high ? values[i + kCount / 2] : values[i];
      const float other = high ? values[i] : values[i + kCount / 2];
      values[i] = mine + __shfl_xor_sync(~0U, other, kMask);
    }
  }
}

template <class C>
class Scorer {
  static constexpr int kPairs = C::kColumns / 8;  // of columns that a lane has of a key
  static constexpr int kRowPairs = C::kHeads / 8;
  static constexpr int kValues = 2 * C::kGroup;  // sums: of each row, for keys g and g + 8
  static constexpr int kRun = C::kRun;
  static constexpr int kOwn = kValues > 4 ? kValues / 4 : 1;  // of them that a lane stores

 public:
  __device__ Scorer(const Params& params, const Memory<C>& memory)
      : params_(params),
        memory_(memory),
        // The same in all lanes, and the compiler knows.
        scorer_(__shfl_sync(~0U, threadIdx.x / 128, 0) - 2),
        tile_(scorer_),
        stage_(scorer_) {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) scale_[i] = find_scale(own_key(i));
  }

  __device__ void run() {
    Shared<C>& shared = memory_.shared;
    const uint32_t chunk_tiles = static_cast<uint32_t>(params_.rows.chunk) / kTile;
    uint32_t group_tile = 0;  // the group's first, of all tiles of this block of threads
    Turn group_turn{params_.groups};
    Turn chunk_turn{kChunks};
    for (int64_t g = last_group<C>(params_); g >= 0; g -= gridDim.x, group_turn.next()) {
      shared.group_full[group_turn.buffer].wait(group_turn.phase);
      const Group<C>& group = shared.groups[group_turn.buffer];
      const uint32_t tiles = (__shfl_sync(~0U, group.size, 0) + kTile - 1) / kTile;
      queries_ = memory_.queries + group_turn.buffer * Memory<C>::kQueryBytes;
      scale_shift_ = group.scale_shift;
      const int c = static_cast<int>(threadIdx.x % 4);
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        const auto pair = reinterpret_cast<const float2*>(group.weights)[4 * i + c];
        weights_[2 * i] = pair.x;
        weights_[2 * i + 1] = pair.y;
      }
      for (uint32_t begin = 0; begin < tiles; begin += chunk_tiles, chunk_turn.next()) {
        shared.chunk_empty[chunk_turn.buffer].wait(chunk_turn.phase ^ 1U);
#pragma unroll
        for (int i = 0; i < kOwn; ++i) {
          const int row = own_value(i) / 2;
          const uint32_t skipped = max(group.rows[row].shift, begin * kTile);
          before_[i] = static_cast<int32_t>(group_tile * kTile + skipped) - own_key(i);
          out_[i] = ptx::shared_address(memory_.chunk(chunk_turn.buffer, row, params_.rows.chunk));
        }
        const uint32_t end = group_tile + min(begin + chunk_tiles, tiles);
        score_tiles(end);
        arrive(shared.chunk_full[chunk_turn.buffer]);
      }
      group_tile += tiles;
      arrive(shared.group_empty[group_turn.buffer]);
    }
  }

 private:
  __device__ static void arrive(ptx::Barrier& barrier) {
    __syncwarp();
    if (threadIdx.x % 32 == 0) barrier.arrive();
  }

  // Which of the warp's kValues sums the lane stores: of row own_value / 2, key half own_value % 2.
  __device__ static int own_value(int i) {
    const int c = static_cast<int>(threadIdx.x % 4);
    return kValues == 2 ? c / 2 : c * kOwn + i;
  }

  // Where a key's scale is in a tile.
  __device__ uint32_t find_scale(uint32_t key) const {
    return key / params_.boxes.keys * params_.boxes.pitch + key % params_.boxes.keys;
  }

  // That sum's key, of 64.
  __device__ static int own_key(int i) {
    return static_cast<int>(threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4) +
           own_value(i) % 2 * 8;
  }

  __device__ void next() {
    tile_ += C::kScorers;
    stage_ += C::kScorers;
    if (stage_ >= static_cast<uint32_t>(params_.stages)) {
      stage_ -= params_.stages;
      phase_ ^= 1U;
    }
  }

  // The chunk's tiles before `end`, kRun at a time. While half of a tile is added up, the next half
  // is multiplied.
  __device__ __forceinline__ void score_tiles(uint32_t end) {
    while (static_cast<int32_t>(tile_ - end) < 0) score_run(end);
  }

  __device__ __forceinline__ void score_run(uint32_t end) {
    Shared<C>& shared = memory_.shared;
    float dots[2][C::kColumns / 2];
    shared.tile_full[stage_].wait(phase_);
    multiply<C>(dots[0], half(stage_, 0), queries_);
#pragma unroll
    for (int run = 0; run < kRun; ++run) {
      const uint32_t stage = stage_;
      const uint32_t tile = tile_;
      multiply<C>(dots[1], half(stage, 1), queries_);
      float scale[2][kOwn];
#pragma unroll
      for (int k = 0; k < 2; ++k)
#pragma unroll
        for (int i = 0; i < kOwn; ++i)
          scale[k][i] = memory_.scale[stage * params_.boxes.tile + k * params_.boxes.half +
                                      scale_shift_ + scale_[i]];
      ptx::wait_for_products<1>();
      add_up(dots[0], scale[0], tile * kTile);
      const bool more = static_cast<int32_t>(tile_ + C::kScorers - end) < 0;
      if (run + 1 < kRun) {
        if (more) {
          next();
          shared.tile_full[stage_].wait(phase_);
        }
        multiply<C>(dots[0], half(stage_, 0), queries_);
        ptx::wait_for_products<1>();
      } else {
        ptx::wait_for_products<0>();
      }
      if (stage != stage_ || run + 1 == kRun) arrive(shared.tile_empty[stage]);
      add_up(dots[1], scale[1], tile * kTile + 64);
    }
    next();
  }

  __device__ const char* half(uint32_t stage, int number) const {
    return memory_.keys + stage * Memory<C>::kTileBytes + number * 64 * C::kPitch;
  }

  // Scores of 64 keys, from their dot products: `key` is the first, of all tiles.
  __device__ __forceinline__ void add_up(float (&dots)[C::kColumns / 2], const float (&scale)[kOwn],
                                         uint32_t key) const {
    ptx::pin(dots);
    float sums[kValues];
    weigh(dots, sums);
    fold<kValues, 2>(sums);
    fold<(kValues + 1) / 2, 1>(sums);
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int32_t at = static_cast<int32_t>(key) - before_[i];
      const bool mine = kValues > 2 || threadIdx.x % 2 == 0;
      ptx::store_if(mine && at >= 0, out_[i] + static_cast<uint32_t>(at) * 4, sums[i] * scale[i]);
    }
  }

  __device__ __forceinline__ void weigh(const float (&dots)[C::kColumns / 2],
                                        float (&sums)[kValues]) const {
#pragma unroll
    for (int row = 0; row < C::kGroup; ++row) {
      float even[2] = {};
      float odd[2] = {};
#pragma unroll
      for (int i = row * kRowPairs; i < (row + 1) * kRowPairs; ++i)
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          even[k] = fmaf(weights_[2 * i], fmaxf(dots[4 * i + 2 * k], 0.0F), even[k]);
          odd[k] = fmaf(weights_[2 * i + 1], fmaxf(dots[4 * i + 2 * k + 1], 0.0F), odd[k]);
        }
#pragma unroll
      for (int k = 0; k < 2; ++k) sums[2 * row + k] = even[k] + odd[k];
    }
  }

  const Params& params_;
  const Memory<C>& memory_;
  const uint32_t scorer_;
  uint32_t tile_;  // the next one to score
  uint32_t stage_;
  uint32_t phase_ = 0;
  const char* queries_;  // in shared memory
  float weights_[2 * kPairs];
  uint32_t scale_shift_;  // of the group
  uint32_t scale_[kOwn];  // where the scales of the lane's own keys are in a tile
  uint32_t out_[kOwn];  // where this chunk's scores go
  int32_t before_[kOwn];  // what a tile's number of keys becomes an index of out_[i] by
};

}  // namespace hisa::cuda::sm90
