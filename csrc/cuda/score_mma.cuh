// Scores on tensor cores, for 16-bit and 8-bit keys:
//   score(n) = scale[n] * sum_h weights[h] * relu(dot(q[h], k[n]))
//
// A warp takes a tile of keys, the A operand, and multiplies it by the row's heads, the B operand,
// 16 at a time (a unit). Queries stay in registers, unless there are too many of them.
//
// What limits it on sm_90: while a product enters the tensor cores, for 6 cycles, its scheduler
// issues nothing else, and every other instruction takes a cycle or more away. So what counts is
// the number of instructions per key; with 64 heads the chip's power comes next.
//
// Each lane copies just what it will multiply itself to a place of its own in shared memory, while
// the tile before is multiplied. So a key is read once per row, and no thread waits for another
// while a row is scored.
//
// A lane holds chunks c, c + 4, c + 8, ... of a key, 16 bytes each, with c = lane % 4. Queries have
// the same order, so it does not matter which channel of a product is which of the key.
//
// Order of the sum over heads, fixed: of every 16 heads, a lane adds 2c, 2c + 1, 2c + 8 and 2c + 9,
// one fused multiply-add after another; then lanes whose c differ by 2, by 1. The key's scale comes
// last. A key's score depends neither on its place in a tile nor on the keys beside it.
#pragma once

#include "memory.cuh"
#include "ptx/address.cuh"
#include "ptx/convert.cuh"
#include "ptx/copy.cuh"
#include "ptx/mma.cuh"
#include "ptx/shared.cuh"
#include "ptx/thread.cuh"
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

template <ElementType kType, Variant kVariant>
class MmaScorer {
  static constexpr int kDim = kVariant.dim;
  static constexpr bool kFp8 = kType == ElementType::kFloat8E4M3;
  static constexpr int kBytes = kFp8 ? 1 : 2;
  static constexpr bool kWiden = kFp8 && !kFp8Mma;  // the products are of fp16
  static constexpr int kChannels = kFp8 ? 16 : 8;  // of a chunk
  static constexpr int kChunks = kDim / kChannels / 4;  // of a key that a lane holds
  static constexpr int kWords = kWiden ? 8 : 4;  // of a chunk, as operands
  static constexpr int kSteps = kChunks * kWords / 2;  // products along the channels

  static constexpr Tile kTile = make_tile(kVariant, kType);
  static constexpr int kStep = kWarps * kTile.keys;  // keys of all warps at a time
  static constexpr int kMTiles = kTile.keys / 16;
  static constexpr int kUnits = kVariant.heads / 16;  // of a row, unless it has more heads
  static constexpr int kHeld = kVariant.more ? 1 : kUnits;  // in registers
  static constexpr int kOverlapped =
      kVariant.more ? 0 : 1;  // last units, while the next tile comes
  static constexpr int kKeys = 2 * kMTiles;  // of a tile that a lane multiplies
  // From Lane::chunks on, in bytes: the scale of the lane's own key, and Source::blocks and scale.
  static constexpr int kOwnScale = kKeys * kChunks * kThreads * 16;
  static constexpr int kSourceBlocks = kOwnScale + 8;
  static constexpr int kSourceScale = kOwnScale + kThreads * 16;
  static_assert(kDim % (4 * kChannels) == 0 && (kMTiles == 1 || kMTiles == 2), "whole tiles");
  static_assert(kTile.keys <= kBehind, "scores that nobody wants have a place");
  static_assert(kTile.bytes == kSourceScale + kThreads * 16);

 public:
  // Whether three blocks of threads per multiprocessor pay, where a row's keys lie apart.
  static constexpr bool kThree =
      kFp8 && !kVariant.more && kVariant.heads * kVariant.dim == 32 * 128;

  __device__ MmaScorer(SharedMemory& memory, char* extra, const Queries& queries, int64_t dim)
      : memory_(memory), queries_(queries), dim_(static_cast<int>(dim)), tile_(extra) {}

  // Score the stage's keys from `begin` on, a chunk, into the region, and up to kBehind behind it.
  __device__ void score(uint32_t begin) const {
    const Source source = memory_.stage.source;
    const uint32_t n = chunk_at(memory_, begin);
    const uint32_t thread = ptx::this_thread();
    const uint32_t tile = thread / 32 * kTile.keys;
    if (tile >= n) return;
    uint32_t tiles = (n - tile + kStep - 1) / kStep;
    Lane lane(*this, source, thread, begin + tile + own_key(thread));
    float* out = memory_.region.scores + tile + own_key(thread);
    fetch(lane, source);
    Unit held[kHeld];
    if constexpr (!kVariant.more)
#pragma unroll
      for (int u = 0; u < kHeld; ++u) load_unit(lane, thread, u, held[u]);
    Operands keys;
    float scale = load(lane, keys);
    fetch(lane, source);
#pragma unroll 1
    for (; tiles > 0; --tiles) {
      float sums[kKeys] = {};
      Dots dots;
      const auto multiply_unit = [&](int u) {
        if constexpr (kVariant.more) load_unit(lane, threadIdx.x, u, held[0]);
        multiply(dots, keys, held[kVariant.more ? 0 : u]);
      };
#pragma unroll(kHeld)
      for (int u = 0; u < units() - kOverlapped; ++u) {
        multiply_unit(u);
        weigh(lane, dots, u, sums);
      }
      if constexpr (kOverlapped > 0) multiply_unit(kUnits - 1);
      const float own_scale = scale;
      scale = load(lane, keys);
      if constexpr (kOverlapped > 0) weigh(lane, dots, kUnits - 1, sums);
      fetch(lane, source);
      store(sums, own_scale, out);
      out += kStep;
    }
    ptx::wait_for_copies<0>();
  }

 private:
  // 16 heads of the row, as B operands: the lane's heads row() and row() + 8, two words of each.
  struct Unit {
    uint4 of[kSteps];
  };
  struct Operands {
    uint32_t of[kMTiles][kSteps][4];
  };
  struct Dots {
    float of[kMTiles][2][4];
  };

  __device__ int units() const {
    return kVariant.more ? (static_cast<int>(queries_.heads) + 15) / 16 : kUnits;
  }

  __device__ static int row(uint32_t thread = threadIdx.x) {
    return static_cast<int>(thread % 32 / 4);
  }
  __device__ static int column(uint32_t thread = threadIdx.x) {
    return static_cast<int>(thread % 4);
  }

  // Number of the lane's j-th chunk, and whether there is one in a key.
  __device__ static int chunk(int j, uint32_t thread = threadIdx.x) {
    return 4 * j + column(thread);
  }
  __device__ bool is_real(int j, uint32_t thread = threadIdx.x) const {
    return !kVariant.padded || chunk(j, thread) * kChannels < dim_;
  }

  // The key of a tile whose score the lane stores; see store().
  __device__ static int own_key(uint32_t thread) {
    return (kKeys == 4 ? column(thread) : column(thread) / 2) * 8 + row(thread);
  }

  // Where the lane reads and writes, for the keys of one source and the queries of one row.
  struct Lane {
    uint32_t position;  // of its own key in the next tile to fetch
    const char* keys;  // from the lane's first chunk on
    const char* query;  // of head row()
    uint32_t chunks;  // in shared memory: of the tile to come, kThreads * 16 bytes apart, and what
                      // would take registers
    uint32_t weights;  // of the first unit, 64 bytes apart

    __device__ Lane(const MmaScorer& scorer, const Source& source, uint32_t thread, uint32_t first)
        : position(first),
          keys(source.data + (scorer.is_real(0, thread) ? column(thread) * 16 : 0)),
          query(static_cast<const char*>(scorer.queries_.data) +
                (scorer.memory_.m * scorer.queries_.row_stride +
                 row(thread) * scorer.queries_.head_stride) *
                    kBytes),
          chunks(ptx::shared_address(scorer.tile_ + thread * 16)),
          weights(ptx::shared_address(scorer.memory_.weights + column(thread) * 4)) {
      keys = ptx::here(keys);  // kept in registers, not derived anew
      query = ptx::here(query);  // or queries are held while a row's selection runs
      ptx::store(chunks + kOwnScale, 1.0F);
      ptx::store(chunks + kSourceBlocks, source.blocks);
      ptx::store(chunks + kSourceScale, source.scale);
    }
  };

  // Begin to copy the lane's next tile. Behind the end come keys from the beginning, since one key
  // for all lanes would take longer than different ones.
  __device__ void fetch(Lane& lane, const Source& source) const {
    const uint32_t position = min(lane.position, lane.position - source.size);
    const uint32_t own = source.key(min(position, source.size - 1),
                                    ptx::load<const int32_t*>(lane.chunks + kSourceBlocks));
    lane.position += kStep;
#pragma unroll
    for (int i = 0; i < kKeys; ++i) {
      const uint32_t key = __shfl_sync(~0U, own, i * (4 / kKeys), 4);
      const char* at = ptx::row_at(lane.keys, key, source.stride);
#pragma unroll
      for (int j = 0; j < kChunks; ++j) {
        const bool real = is_real(j);
        ptx::copy_16(lane.chunks + (i * kChunks + j) * kThreads * 16, at + (real ? j * 64 : 0),
                     real);
      }
    }
    const auto* scale = ptx::load<const float*>(lane.chunks + kSourceScale);
    if (scale != nullptr) ptx::copy_4(lane.chunks + kOwnScale, scale + own);
    ptx::commit_copies();
  }

  // The tile that was fetched; returns the scale of the lane's own key.
  __device__ static float load(const Lane& lane, Operands& keys) {
    ptx::wait_for_copies<0>();
#pragma unroll
    for (int j = 0; j < kChunks; ++j)
#pragma unroll
      for (int i = 0; i < kKeys; ++i) {
        uint32_t words[kWords];
        to_operands(ptx::load_16(lane.chunks + (i * kChunks + j) * kThreads * 16), words);
#pragma unroll
        for (int w = 0; w < kWords; ++w)
          keys.of[i / 2][(j * kWords + w) / 2][i % 2 + w % 2 * 2] = words[w];
      }
    return ptx::load<float>(lane.chunks + kOwnScale);
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

  // The heads of unit u, zeros behind the last.
  __device__ void load_unit(const Lane& lane, uint32_t thread, int u, Unit& unit) const {
#pragma unroll
    for (int j = 0; j < kChunks; ++j) {
      uint32_t words[2][kWords];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int head = u * 16 + r * 8;
        const bool real = head + row(thread) < queries_.heads && is_real(j, thread);
        const auto* query =
            reinterpret_cast<const uint4*>(lane.query + head * queries_.head_stride * kBytes);
        to_operands(real ? __ldg(query + chunk(j, thread)) : uint4{0, 0, 0, 0}, words[r]);
      }
#pragma unroll
      for (int w = 0; w < kWords; w += 2)
        unit.of[(j * kWords + w) / 2] = {words[0][w], words[0][w + 1], words[1][w],
                                         words[1][w + 1]};
    }
  }

  __device__ static void multiply(Dots& dots, const Operands& keys, const Unit& unit) {
    dots = {};
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const uint4& b = unit.of[step];
#pragma unroll
      for (int m = 0; m < kMTiles; ++m) {
        mma(dots.of[m][0], keys.of[m][step], b.x, b.y);
        mma(dots.of[m][1], keys.of[m][step], b.z, b.w);
      }
    }
  }

  // Add the heads of unit u to the lane's part of the sums.
  __device__ static void weigh(const Lane& lane, const Dots& dots, int u, float (&sums)[kKeys]) {
    const uint4 bits = ptx::load_16(lane.weights + u * 64);
    const float weights[2][2] = {{__uint_as_float(bits.x), __uint_as_float(bits.y)},
                                 {__uint_as_float(bits.z), __uint_as_float(bits.w)}};
#pragma unroll
    for (int i = 0; i < kKeys; ++i)
#pragma unroll
      for (int h = 0; h < 4; ++h)
        sums[i] = fmaf(weights[h / 2][h % 2], fmaxf(dots.of[i / 2][h / 2][i % 2 * 2 + h % 2], 0.0F),
                       sums[i]);
  }

  // Add up the four lanes of each key and store its score. The two lanes of a pair go on with half
  // of the keys each, as long as there are several.
  __device__ static void store(float (&sums)[kKeys], float scale, float* out) {
    fold<kKeys / 2, 2>(sums);
    fold<kKeys / 4, 1>(sums);
    if (kKeys == 4 || column() % 2 == 0) *out = sums[0] * scale;
  }

  template <int kHalf, int kMask>
  __device__ static void fold(float (&values)[kKeys]) {
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
  char* tile_;  // to come, see Lane::chunks
};

}  // namespace hisa::cuda
