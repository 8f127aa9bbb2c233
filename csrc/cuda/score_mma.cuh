// Scores on tensor cores, for 16-bit and 8-bit keys:
//   score(n) = scale[n] * sum_h weights[h] * relu(dot(q[h], k[n]))
//
// A row's queries stay in registers, as the A operand of every product; keys pass by as the B
// operand. Each lane copies just what it will multiply itself, some tiles ahead, to a ring of its
// own in shared memory: a place to wait that takes no registers. So a key is read once per row, and
// no thread waits for another while a row is scored.
//
// A tile of keys takes two units of products. While one unit is on the tensor cores, the warp
// weighs the unit before and adds up its heads.
//
// A lane holds chunks c, c + 4, c + 8, ... of a key, 16 bytes each, with c = lane % 4. Queries have
// the same order, so it does not matter which channel of a product is which of the key.
//
// Order of the sum over heads, fixed: with g = lane / 4, a lane adds heads g, g + 8, g + 16, ...
// one fused multiply-add after another; then lanes whose g differ by 4, by 2, by 1. Groups of
// kHeads heads follow each other, and the key's scale comes last. A key's score depends neither on
// its place in a tile nor on the keys beside it.
#pragma once

#include "memory.cuh"
#include "ptx/convert.cuh"
#include "ptx/copy.cuh"
#include "ptx/mma.cuh"
#include "variants.h"

namespace hisa::cuda {

// sm_89 and sm_12x multiply fp8 twice as fast as fp16. On sm_90 such a product becomes a conversion
// and an fp16 product, so keys are converted once instead.
#if defined(HISA_FP8_MMA) || \
    (defined(__CUDA_ARCH__) && (__CUDA_ARCH__ == 890 || __CUDA_ARCH__ >= 1200))
inline constexpr bool kFp8Mma = true;
#else
inline constexpr bool kFp8Mma = false;
#endif

// Before sm_89, widening fp8 takes registers.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 890
inline constexpr bool kWidenInSoftware = true;
#else
inline constexpr bool kWidenInSoftware = false;
#endif

template <ElementType kType, Variant kVariant>
class MmaScorer {
  static constexpr int kHeads = kVariant.heads;
  static constexpr int kDim = kVariant.dim;
  static constexpr bool kFp8 = kType == ElementType::kFloat8E4M3;
  static constexpr bool kWiden = kFp8 && !kFp8Mma;  // the products are of fp16
  static constexpr int kChannels = kFp8 ? 16 : 8;  // of a chunk
  static constexpr int kChunks = kDim / kChannels / 4;  // of a key that a lane holds
  static constexpr int kWords = kWiden ? 8 : 4;  // of a chunk, as operands
  static constexpr int kSteps = kChunks * kWords / 2;  // products along the channels

  static constexpr Tile kTile = make_tile(kVariant, kType);
  static constexpr int kStages = kTile.stages;
  static constexpr int kAhead = kStages - 1;  // tiles on their way
  static constexpr int kStageBytes = kTile.ring / kStages;
  static constexpr int kStep = kWarps * kTile.keys;  // keys of all warps at a time
  static constexpr int kMTiles = kHeads / 16;  // of a unit
  static constexpr int kNTiles = kTile.keys / 16;  // of a unit
  static constexpr int kKeys = 2 * kNTiles;  // of a tile that a lane multiplies
  static constexpr int kValues = 2 * kKeys;  // keys of a tile that a lane has sums of
  static constexpr int kOwned = (kValues + 7) / 8;  // of these, the ones whose scores it stores
  static_assert(kDim % (4 * kChannels) == 0 && kHeads % 16 == 0 && kNTiles > 0, "whole tiles");
  static_assert(kStep + 8 <= kBefore && kTile.keys + 8 <= kBehind,
                "scores that nobody wants have a place");

 public:
  static constexpr int64_t shared_bytes(int64_t) { return kTile.ring; }
  static_assert(kTile.ring == kStages * kThreads * (kKeys * kChunks * 16 + kOwned * 4));

  __device__ MmaScorer(SharedMemory& memory, void* ring, const Queries& queries, int64_t dim)
      : memory_(memory),
        queries_(queries),
        dim_(static_cast<int>(dim)),
        ring_(static_cast<char*>(ring)) {}

  __device__ int groups() const {
    if (!kVariant.more) return 1;
    return (static_cast<int>(queries_.heads) + kHeads - 1) / kHeads;
  }

  // Score keys [begin, begin + n) of the source for heads [group * kHeads, ..) of row m, into
  // scores [n], and also up to kBefore before and kBehind behind them.
  __device__ void score(int64_t m, int group, const Source& source, uint32_t begin, uint32_t n,
                        float* scores) {
    // Tiles begin at multiples of 8 keys, so that no eight are cut by a block.
    const uint32_t early = (source.first + begin) % 8;
    uint32_t tile = threadIdx.x / 32 * kTile.keys;
    n += early;
    if (tile >= n) return;
    group_ = group;
    uint32_t distance = source.first + begin - early + tile;  // of the next tile to fetch
    const Fetch fetch(*this, source);
    const bool scaled = source.scale != nullptr && group + 1 == groups();  // after the last group
#pragma unroll
    for (int i = 0; i < kAhead; ++i, distance += kStep) fetch(distance, i * kStageBytes);
    load_queries(m);

    Dots dots[2] = {};
    Sums sums{};
    int stage = 0;  // of the tile at hand, in bytes
    // Before the first unit comes a zero one. Its scores go where nobody looks.
    float* out = scores + tile - early - kStep;
    float scale[kOwned];
    for (float& one : scale) one = 1;
#pragma unroll 1
    for (; tile < n; tile += kStep) {
      ptx::wait_for_copies<kAhead - 1>();
      fetch(distance, stage == 0 ? kAhead * kStageBytes : stage - kStageBytes);
      distance += kStep;
      run_unit<0>(dots[0], dots[1], sums, stage);
      store(sums, scale, out);
      out += kStep;
#pragma unroll
      for (int i = 0; i < kOwned; ++i) scale[i] = scaled ? waiting_scale(stage, i) : 1.0F;
      run_unit<1>(dots[1], dots[0], sums, stage);
      stage = stage == kAhead * kStageBytes ? 0 : stage + kStageBytes;
    }
#pragma unroll
    for (int i = 0; i < kMTiles; ++i) weigh<1>(dots[1], i, sums);
    store(sums, scale, out);
    ptx::wait_for_copies<0>();
  }

 private:
  struct Dots {
    float of[kMTiles][kNTiles][4];
  };
  struct Sums {
    float of[2][kNTiles][2];  // unit, tile, key 2 column() or the one behind it
  };

  __device__ static int row() { return static_cast<int>(threadIdx.x % 32 / 4); }
  __device__ static int column() { return static_cast<int>(threadIdx.x % 4); }

  // Number of the lane's j-th chunk, and whether there is one in a key.
  __device__ static int chunk(int j) { return 4 * j + column(); }
  __device__ bool is_real(int j) const { return !kVariant.padded || chunk(j) * kChannels < dim_; }

  // Where chunk j of the lane's i-th key of a tile waits, and the scale of the i-th that it stores.
  __device__ uint4& waiting(int stage, int i, int j) const {
    return reinterpret_cast<uint4*>(ring_ + stage)[(i * kChunks + j) * kThreads + threadIdx.x];
  }
  __device__ float& waiting_scale(int stage, int i) const {
    return reinterpret_cast<float*>(&waiting(stage, kKeys, 0) -
                                    threadIdx.x)[i * kThreads + threadIdx.x];
  }

  // The i-th key of a tile whose score the lane stores; see store().
  __device__ static int own_key(int i) {
    const int value = kValues == 4 ? row() / 2 : row() * kOwned + i;
    return value / 2 * 8 + column() * 2 + value % 2;
  }

  // Begins to copy tiles of a source.
  class Fetch {
   public:
    __device__ Fetch(const MmaScorer& scorer, const Source& source)
        : scorer_(scorer),
          source_(source),
          last_((source.first + source.size - 1) & ~7U),
          keys_(source.data + (scorer.is_real(0) ? column() * 16 : 0)),
          scales_(source.scale == nullptr ? source.data
                                          : reinterpret_cast<const char*>(source.scale)),
          scale_bytes_(source.scale == nullptr ? 0 : sizeof(float)) {}

    // The tile at `distance`, see Source::key_at(); behind the end, the last key.
    __device__ void operator()(uint32_t distance, int stage) const {
      uint32_t keys[kKeys];
#pragma unroll
      for (int i = 0; i < kKeys; ++i) {
        keys[i] = source_.key_at(min(distance + i * 8, last_));  // of eight in the same block
        const char* at = keys_ + min(keys[i] + row(), source_.last_key) * uint64_t{source_.stride};
#pragma unroll
        for (int j = 0; j < kChunks; ++j) {
          const bool real = scorer_.is_real(j);
          ptx::copy_16(&scorer_.waiting(stage, i, j), at + (real ? j * 64 : 0), real);
        }
      }
      pick<kKeys / 2, 16>(keys);  // of the eight with the scores that the lane stores
#pragma unroll
      for (int i = 0; i < kOwned; ++i) {
        const uint32_t key = min(keys[0] + own_key(i) % 8, source_.last_key);
        ptx::copy_4(&scorer_.waiting_scale(stage, i), scales_ + key * uint64_t{scale_bytes_},
                    scale_bytes_ > 0);
      }
      ptx::commit_copies();
    }

   private:
    const MmaScorer& scorer_;
    const Source& source_;
    uint32_t last_;  // distance of the last eight
    const char* keys_;  // from the lane's first chunk on
    const char* scales_;  // if there are none, some address
    uint32_t scale_bytes_;
  };

  __device__ void load_queries(int64_t m) {
    constexpr int kBytes = kFp8 ? 1 : 2;
    const char* first = static_cast<const char*>(queries_.data) + m * queries_.row_stride * kBytes;
    // NOTE: zero, but not to the compiler: it would leave 16-bit queries where they were loaded,
    // and move them into place for every single product.
    const uint32_t nothing = kWiden ? 0 : static_cast<uint32_t>(dim_) >> 16;
#pragma unroll
    for (int i = 0; i < kMTiles; ++i) weight_[i] = shared_weights()[i * 8 + row()];
#pragma unroll
    for (int i = 0; i < kHeads / 8; ++i) {
      const int head = group_ * kHeads + i * 8 + row();
      const auto* query =
          reinterpret_cast<const uint4*>(first + head * queries_.head_stride * kBytes);
#pragma unroll
      for (int j = 0; j < kChunks; ++j) {
        uint32_t words[kWords];
        const bool real = head < queries_.heads && is_real(j);
        to_operands(real ? __ldg(query + chunk(j)) : uint4{0, 0, 0, 0}, words);
#pragma unroll
        for (int w = 0; w < kWords; ++w)
          query_[i / 2][(j * kWords + w) / 2][i % 2 + w % 2 * 2] = words[w] ^ nothing;
      }
    }
  }

  __device__ static void to_operands(const uint4& chunk, uint32_t (&words)[kWords]) {
    const uint32_t packed[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (kWiden) {
        uint32_t pairs[2];
        ptx::widen_e4m3(packed[i], pairs);
        words[2 * i] = pairs[0];
        words[2 * i + 1] = pairs[1];
      } else {
        words[i] = packed[i];
      }
    }
  }

  __device__ static void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    if constexpr (kType == ElementType::kBFloat16) {
      ptx::mma_bf16(d, a, b0, b1);
    } else if constexpr (kFp8 && kFp8Mma) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
      ptx::mma_e4m3(d, a, b0, b1);
#endif
    } else {
      ptx::mma_fp16(d, a, b0, b1);
    }
  }

  // Unit kUnit into `dots`, while the unit before is weighed.
  template <int kUnit>
  __device__ void run_unit(Dots& dots, const Dots& previous, Sums& sums, int stage) const {
    dots = {};
#pragma unroll
    for (int j = 0; j < kChunks; ++j) {
      uint32_t words[kNTiles][kWords];
#pragma unroll
      for (int n = 0; n < kNTiles; ++n)
        to_operands(waiting(stage, kUnit * kNTiles + n, j), words[n]);
#pragma unroll
      for (int w = 0; w < kWords; w += 2) {
        const int step = (j * kWords + w) / 2;
#pragma unroll
        for (int m = 0; m < kMTiles; ++m)
#pragma unroll
          for (int n = 0; n < kNTiles; ++n)
            mma(dots.of[m][n], query_[m][step], words[n][w], words[n][w + 1]);
#pragma unroll
        for (int m = 0; m < kMTiles; ++m)
          if (m * kSteps / kMTiles == step) weigh<1 - kUnit>(previous, m, sums);
      }
    }
  }

  // Of heads row() and row() + 8 of each tile of 16.
  __device__ const float2* shared_weights() const {
    return reinterpret_cast<const float2*>(memory_.weights + group_ * kHeads);
  }

  // Add the m-th tile of heads of unit kUnit to the lane's part of the sums over heads.
  template <int kUnit>
  __device__ void weigh(const Dots& dots, int m, Sums& sums) const {
    constexpr bool kSpare = !kVariant.more && !(kFp8 && kWidenInSoftware);  // registers
    const float2 weight = kSpare ? weight_[m] : shared_weights()[m * 8 + row()];
#pragma unroll
    for (int n = 0; n < kNTiles; ++n)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float* dot = dots.of[m][n] + i;
        float& sum = sums.of[kUnit][n][i];
        sum = fmaf(weight.x, fmaxf(dot[0], 0.0F), sum);
        sum = fmaf(weight.y, fmaxf(dot[2], 0.0F), sum);
      }
  }

  // Add up the eight lanes of each key, store the scores, and start from zero.
  __device__ void store(Sums& sums, const float (&scale)[kOwned], float* out) const {
    float values[kValues];
#pragma unroll
    for (int i = 0; i < kValues; ++i) values[i] = sums.of[i / kNTiles / 2][i / 2 % kNTiles][i % 2];
    sums = {};
    // The two lanes of a pair go on with half of the keys each, as long as there are several.
    fold<kValues / 2, 16>(values);
    fold<kValues / 4, 8>(values);
    fold<kValues / 8, 4>(values);
#pragma unroll
    for (int i = 0; i < kOwned; ++i) {
      float* score = out + own_key(i);
      if (kValues == 4 && row() % 2 != 0) continue;  // the sum is in two lanes
      float sum = values[i];
      if (kVariant.more && group_ > 0) sum = *score + sum;  // the groups before, by this same lane
      *score = sum * scale[i];
    }
  }

  // The lane's own one of 2 kHalf keys becomes the first.
  template <int kHalf, int kMask>
  __device__ static void pick(uint32_t (&keys)[kKeys]) {
    if constexpr (kHalf > 0) {
#pragma unroll
      for (int i = 0; i < kHalf; ++i)
        keys[i] = (threadIdx.x & kMask) != 0 ? keys[i + kHalf] : keys[i];
      pick<kHalf / 2, kMask / 2>(keys);
    }
  }

  template <int kHalf, int kMask>
  __device__ static void fold(float (&values)[kValues]) {
    const bool high = (threadIdx.x & kMask) != 0;
#pragma unroll
    for (int i = 0; i < (kHalf > 0 ? kHalf : 1); ++i) {
      const float mine = kHalf > 0 && high ? values[i + kHalf] : values[i];
      const float other = kHalf > 0 && !high ? values[i + kHalf] : values[i];
      values[i] = mine + __shfl_xor_sync(~0U, other, kMask);
    }
  }

  SharedMemory& memory_;
  const Queries& queries_;
  int dim_;
  char* ring_;  // [kStages] of keys [kKeys, kChunks, kThreads, 16] and scales [kOwned, kThreads]
  int group_ = 0;
  uint32_t query_[kMTiles][kSteps][4];
  float2 weight_[kMTiles];  // see shared_weights()
};

}  // namespace hisa::cuda
