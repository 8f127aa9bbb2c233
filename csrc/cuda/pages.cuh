// Keys in pages, as a block of threads finds them: see ../pages.h. Sizes of pages are powers of
// two, and tokens of a sequence int32.
#pragma once

#include "../pages.h"
#include "pool.cuh"

namespace hisa::cuda {

__device__ inline int log2_of(int64_t power) { return __ffs(static_cast<int>(power)) - 1; }

// A sequence's row of the table as all kThreads threads of a block read it, which all have to make
// one. Its first ids are on their way while the length is.
template <int kThreads>
class TableRow {
 public:
  __device__ TableRow(const PagedKeys& keys, int64_t sequence) : keys_(keys), sequence_(sequence) {
    const PageTable& table = keys.table;
    const int32_t given = table.lengths[sequence];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int page = at(i);
      ids_[i] = page < table.width ? table.ids[sequence * table.stride + page] : -1;
    }
    wanted_ =
        static_cast<int32_t>(min(int64_t{max(given, 0)}, table.width << log2_of(keys.page_size)));
  }

  // PageTable::length() if no page is missing.
  __device__ int wanted() const { return wanted_; }

  // PageTable::length(). All threads have to call it.
  __device__ int length() const {
    const int shift = log2_of(keys_.page_size);
    const auto pages = static_cast<int>((int64_t{wanted_} + keys_.page_size - 1) >> shift);
    int missing = INT32_MAX;  // the first that this thread knows of
#pragma unroll
    for (int i = kAhead - 1; i >= 0; --i)
      if (at(i) < pages && (ids_[i] < 0 || ids_[i] >= keys_.table.pages)) missing = at(i);
#pragma unroll 8
    for (int page = at(kAhead); page < pages; page += kThreads)
      if (keys_.table.page(sequence_, page) < 0) missing = min(missing, page);
    if (__syncthreads_or(missing < INT32_MAX ? 1 : 0) == 0) return wanted_;
    __shared__ int first_missing;
    if (threadIdx.x == 0) first_missing = INT32_MAX;
    __syncthreads();
    atomicMin(&first_missing, missing);
    __syncthreads();
    return first_missing << shift;
  }

 private:
  static constexpr int kAhead = 8;  // ids of a thread
  __device__ static int at(int i) { return static_cast<int>(threadIdx.x) + i * kThreads; }

  const PagedKeys& keys_;
  int64_t sequence_;
  int32_t ids_[kAhead];
  int wanted_;
};

// PageTable::length() by all kThreads threads of a block, which all have to call it, once.
template <int kThreads>
__device__ int64_t find_length(const PagedKeys& keys, int64_t sequence) {
  return TableRow<kThreads>(keys, sequence).length();
}

// Where token t of a sequence lies, on a page that exists.
__device__ inline TokenAt find_token(const PagedKeys& keys, int64_t sequence, int64_t t) {
  const int64_t page = keys.table.page(sequence, t >> log2_of(keys.page_size));
  const int64_t at = t & (keys.page_size - 1);
  const char* const key = static_cast<const char*>(keys.data) + page * keys.stride +
                          at * keys.dim * element_size(keys.type);
  if (keys.scale == nullptr) return {key, nullptr};
  const char* const scale = static_cast<const char*>(keys.scale) + page * keys.scale_stride;
  return {key, reinterpret_cast<const float*>(scale) + at};
}

}  // namespace hisa::cuda
