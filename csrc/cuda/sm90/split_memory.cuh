// Memory of a block of threads that scores a part of a row, and how it finds keys.
#pragma once

#include "../ptx/address.cuh"
#include "../ptx/cluster.cuh"
#include "../ptx/copy.cuh"
#include "../ptx/overlap.cuh"
#include "../ptx/warpgroup.cuh"
#include "params.h"
#include "products.cuh"
#include "split.h"

namespace hisa::cuda::sm90 {

template <ElementType kType_, int kHeads_, int kDim>
struct SplitConfig {
  static constexpr ElementType kType = kType_;
  static constexpr int kHeads = kHeads_;
  static constexpr int kColumns = kHeads;  // of a product
  static constexpr int kRowBytes = kDim * static_cast<int>(element_size(kType));
  static constexpr int kTile = kSplitTile;
  static constexpr int kPitch = kRowBytes < 128 ? kRowBytes : 128;  // of a panel
  static constexpr int kPanels = kRowBytes / kPitch;
  static constexpr int kSteps = kPitch / 32;  // products along a panel
  static constexpr int kScorers = kSplitScorers;
  static constexpr int kThreads = 128 * kScorers;
  static constexpr int kStages = kSplitStages;
  static constexpr int kBlocks = kHeads > 64 ? 1 : 2;  // of a multiprocessor, by registers
  static constexpr int kTileBytes = kTile * kRowBytes;
};

// No key.
inline constexpr uint32_t kNowhere = ~0U;

template <class C>
struct SplitMemory {
  SplitShared& shared;
  char* queries;
  char* keys;    // [kScorers, kStages] tiles
  float* scale;  // [kScorers, kStages, kTile]
  float* slots;  // scores of blocks
  float* tokens;
  int32_t* blocks;  // [kept] first tokens, ascending

  __device__ SplitMemory(char* start, const SplitLayout& at)
      : shared(*reinterpret_cast<SplitShared*>(start + at.shared)),
        queries(start),
        keys(start + at.keys),
        scale(reinterpret_cast<float*>(start + at.scale)),
        slots(reinterpret_cast<float*>(start + at.slots)),
        tokens(reinterpret_cast<float*>(start + at.tokens)),
        blocks(reinterpret_cast<int32_t*>(start + at.blocks)) {}

  // What is selected, where keys were.
  __device__ uint32_t* chosen() const { return reinterpret_cast<uint32_t*>(keys); }
  // All scores of blocks (0) or of tokens (1) have come from the peers.
  __device__ ptx::Barrier& full(int i) const {
    return reinterpret_cast<ptx::Barrier*>(shared.full)[i];
  }
};

// Begin to copy the row's queries.
template <class C>
__device__ __forceinline__ void copy_queries(const Queries& queries, int64_t m, char* to) {
  constexpr uint32_t kPieces = C::kRowBytes / 16;
  constexpr uint32_t kPanelPieces = C::kPitch / 16;
  constexpr int64_t kElement = element_size(C::kType);
  const char* row = static_cast<const char*>(queries.data) + m * queries.row_stride * kElement;
  const uint32_t start = ptx::shared_address(to);
#pragma unroll
  for (uint32_t i = threadIdx.x; i < C::kHeads * kPieces; i += C::kThreads) {
    const uint32_t head = i / kPieces;
    const uint32_t piece = i % kPieces;
    ptx::copy_16(start + piece / kPanelPieces * C::kColumns * C::kPitch +
                     ptx::swizzled<C::kPitch>(head, piece % kPanelPieces),
                 row + head * queries.head_stride * kElement + piece * 16, true);
  }
}

// Begin to copy a tile of keys and their scales, given their numbers; those of kNowhere become
// zeros, with NaN for a scale. The 128 threads of a scorer call it.
template <class C>
__device__ __forceinline__ void copy_tile(const Storage& from, const uint32_t* numbers, char* to,
                                          float* scale) {
  constexpr uint32_t kPieces = C::kRowBytes / 16;
  constexpr uint32_t kPanelPieces = C::kPitch / 16;
  const uint32_t thread = threadIdx.x % 128;
  const uint32_t inside = (1U << from.page_shift) - 1;
  const uint32_t piece = thread % kPieces;
  const char* data = from.data + piece * 16;
  const uint32_t start = ptx::shared_address(to) + piece / kPanelPieces * C::kTile * C::kPitch;
#pragma unroll
  for (uint32_t i = 0; i < C::kTile * kPieces / 128; ++i) {
    const uint32_t key = i * (128 / kPieces) + thread / kPieces;
    const uint32_t number = numbers[key];
    const bool real = number != kNowhere;
    const uint32_t distance =
        (number >> from.page_shift) * from.page_stride + (number & inside) * from.stride;
    ptx::copy_16(start + ptx::swizzled<C::kPitch>(key, piece % kPanelPieces),
                 ptx::row_at(data, real ? distance : 0, from.unit), real);
  }
  if (thread >= C::kTile) return;
  const uint32_t number = numbers[thread];
  if (from.scale == nullptr || number == kNowhere)
    scale[thread] = number == kNowhere ? NAN : 1.0F;  // which is their score
  else
    ptx::copy_4(ptx::shared_address(scale + thread),
                ptx::row_at(ptx::row_at(reinterpret_cast<const char*>(from.scale),
                                        number >> from.page_shift, from.scale_page_stride),
                            number & inside, sizeof(float)));
}

}  // namespace hisa::cuda::sm90
