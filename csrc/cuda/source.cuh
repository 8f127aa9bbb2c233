// The keys that one stage scores for one row, numbered from 0 on in ascending order: positions.
#pragma once

#include "params.h"

namespace hisa::cuda {

struct Source {
  const char* data;    // [.., dim] of the keys' type, rows `stride` bytes apart
  const float* scale;  // [..], may be null: all 1
  uint32_t stride;
  uint32_t size;  // positions
  // NOTE: no special cases, since a branch would cut the scorers' loops in two. Adjacent keys are a
  // single block at 0, of 2^31.
  const int32_t* blocks;  // first key of each block, ascending
  uint32_t first;  // distance of position 0 to the start of blocks[0]
  int block_shift;  // log2 of the block size, at least 3
  // What a key stands for, (key - origin) * 2^value_shift + value_origin: a token relative to the
  // window, or a block by its first token.
  int32_t origin;
  int value_shift;
  int32_t value_origin;

  __device__ __forceinline__ uint32_t key(uint32_t position, const int32_t* of_blocks) const {
    const uint32_t distance = first + position;  // all blocks laid end to end
    return static_cast<uint32_t>(of_blocks[distance >> block_shift]) +
           (distance & ((1U << block_shift) - 1));
  }
  __device__ __forceinline__ uint32_t key(uint32_t position) const { return key(position, blocks); }
  __device__ __forceinline__ int32_t value(uint32_t position) const {
    const auto relative = static_cast<int32_t>(key(position) - origin);
    return (relative << value_shift) + value_origin;
  }
};

static __device__ const int32_t kSingleBlock = 0;  // of keys that lie side by side

// Keys from `first` on that lie side by side.
__device__ inline Source adjacent(const Keys& keys, int64_t first, int64_t size) {
  return {.data = static_cast<const char*>(keys.data),
          .scale = keys.scale,
          .stride = static_cast<uint32_t>(keys.stride * element_size(keys.type)),
          .size = static_cast<uint32_t>(size),
          .blocks = &kSingleBlock,
          .first = static_cast<uint32_t>(first),
          .block_shift = 31,
          .origin = static_cast<int32_t>(first),
          .value_shift = 0,
          .value_origin = 0};
}

}  // namespace hisa::cuda
