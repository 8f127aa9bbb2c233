// Memory of a block of threads: what is shared, and the row's region of scores, which may lie
// outside of it.
#pragma once

#include <cmath>

#include "../windows.h"
#include "source.cuh"

namespace hisa::cuda {

inline constexpr int kHistogram = 2048;  // bins: 11 bits of a score's key at a time

// Candidates with a score above `score` pass, and the first `ties` of those that equal it.
struct Bar {
  float score = -INFINITY;
  uint32_t ties = ~0U;  // with this score: everything passes

  __device__ bool below(float candidate) const { return candidate > score; }
  // NaN ranks with -inf.
  __device__ bool equals(float candidate) const {
    return candidate == score || (score == -INFINITY && !(candidate > score));
  }
};

// What a stage does for a row: the best `count` of the source go to `values`, in ascending order.
struct Stage {
  Source source;
  uint32_t count;
  int32_t* values;
  float* scores;  // may be null
  bool last;
};

// Scores of one row. A source that fits is scored into all of it; a longer one in chunks, and
// what is still in the running is kept in the buffer, in ascending order. A scorer may write
// kBehind scores behind those wanted: there is room, and nothing of worth.
struct Region {
  float* scores;  // [size] = the chunk [chunk], [kBehind], the buffer [2, capacity]
  int64_t size;
  uint32_t chunk;
  uint32_t capacity;  // of the buffer

  __device__ int32_t* blocks() const {  // [kept] first tokens, behind the scores of a last tile
    return reinterpret_cast<int32_t*>(scores + size + kBehind);
  }
  __device__ bool holds(const Source& source) const { return source.size <= size; }
  __device__ float* buffer_scores() const { return scores + chunk + kBehind; }
  __device__ int32_t* buffer_values() const {  // what will be returned: a block or a token
    return reinterpret_cast<int32_t*>(buffer_scores() + capacity);
  }
};

struct alignas(16) SharedMemory {
  alignas(16) float weights[128];  // of the row's heads, see weight_slot(); zero behind the last
  uint32_t sums[2][kSelectThreads / 32];
  struct {
    uint32_t bin, before, count;  // `before` candidates are in higher bins
  } found;
  Region region;  // of this block of threads, for every row
  // What all threads know about row m, the one at hand. It lies here to spare registers.
  int64_t m;
  Row row;
  uint32_t kept;  // blocks
  Stage stage;
  bool scored;  // whether any of its stages was: they are not where everything is selected
  uint32_t buffered;  // candidates in the buffer
  Bar bar;  // that later candidates have to pass
};

// Positions of the stage that are scored at once, from `begin` on.
__device__ __forceinline__ uint32_t chunk_at(const SharedMemory& memory, uint32_t begin) {
  const uint32_t size = memory.stage.source.size;
  const uint32_t chunk = memory.region.holds(memory.stage.source) ? size : memory.region.chunk;
  return chunk < size - begin ? chunk : size - begin;
}

// Of every 16 heads, 2c, 2c + 1, 2c + 8 and 2c + 9 lie side by side: the tensor cores' layout.
__device__ constexpr int weight_slot(int head) {
  return head / 16 * 16 + head % 8 / 2 * 4 + head / 8 % 2 * 2 + head % 2;
}

inline constexpr int64_t kSharedBytes = (sizeof(SharedMemory) + 15) / 16 * 16;

// The selection's histogram lies where the scorer has its tiles: both are never needed at once.
__device__ __forceinline__ uint32_t* histogram(SharedMemory& memory) {
  return reinterpret_cast<uint32_t*>(reinterpret_cast<char*>(&memory) + kSharedBytes);
}

}  // namespace hisa::cuda
