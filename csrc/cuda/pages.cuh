// Keys in pages, as a block of threads finds them: see ../pages.h.
#pragma once

#include "../pages.h"
#include "pool.cuh"

namespace hisa::cuda {

// PageTable::length() by all kThreads threads of a block, which all have to call it.
template <int kThreads>
__device__ int64_t find_length(const PagedKeys& keys, int64_t sequence) {
  __shared__ int32_t first_missing;
  const PageTable& table = keys.table;
  const int64_t wanted = min(int64_t{table.lengths[sequence]}, table.width * keys.page_size);
  if (threadIdx.x == 0) first_missing = INT32_MAX;
  __syncthreads();
  const auto pages =
      static_cast<int32_t>((max(wanted, int64_t{0}) + keys.page_size - 1) / keys.page_size);
  int32_t mine = INT32_MAX;
#pragma unroll 8
  for (auto i = static_cast<int32_t>(threadIdx.x); i < pages; i += kThreads)
    if (table.page(sequence, i) < 0) mine = min(mine, i);
  if (mine != INT32_MAX) atomicMin(&first_missing, mine);
  __syncthreads();
  const int32_t missing = first_missing;
  __syncthreads();  // before the next call
  return max(int64_t{0}, missing < pages ? missing * keys.page_size : wanted);
}

// Where token t of a sequence lies, on a page that exists.
__device__ inline TokenAt find_token(const PagedKeys& keys, int64_t sequence, int64_t t) {
  const int64_t page = keys.table.page(sequence, t / keys.page_size);
  const int64_t at = t % keys.page_size;
  const char* const key = static_cast<const char*>(keys.data) + page * keys.stride +
                          at * keys.dim * element_size(keys.type);
  if (keys.scale == nullptr) return {key, nullptr};
  const char* const scale = static_cast<const char*>(keys.scale) + page * keys.scale_stride;
  return {key, reinterpret_cast<const float*>(scale) + at};
}

}  // namespace hisa::cuda
