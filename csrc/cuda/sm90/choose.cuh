// Whether to refine rows by pairs. That pays where neighbours keep mostly the same blocks, which
// only the GPU knows: so both kernels are launched, all blocks of threads of both look at the same
// few rows, and those of one of them end. No result depends on it.
#pragma once

#include "shared.cuh"

namespace hisa::cuda::sm90 {

inline constexpr uint32_t kSampledPairs = 16;

// How many of a's blocks are among b's, for the lanes of a warp together. Both are ascending.
__device__ inline uint32_t count_common(const int32_t* a, uint32_t of_a, const int32_t* b,
                                        uint32_t of_b) {
  uint32_t common = 0;
  for (uint32_t i = threadIdx.x % 32; i < of_a; i += 32) {
    uint32_t at = 0;  // blocks of b before a[i]
    for (uint32_t step = kPairBlocks; step > 0; step /= 2)
      if (at + step <= of_b && b[at + step - 1] < a[i]) at += step;
    common += at < of_b && b[at] == a[i];
  }
  return __reduce_add_sync(~0U, common);
}

// All threads of the block call it; `votes` is 0 in shared memory.
__device__ inline bool pairs_pay(const Params& params, uint32_t& votes) {
  const RowsParams& rows = params.rows;
  const uint32_t warp = threadIdx.x / 32;
  if (warp < kSampledPairs) {
    const int64_t pairs = rows.queries.rows / 2;
    const int64_t m = pairs * (2 * warp + 1) / (2 * kSampledPairs) * 2;
    uint32_t kept[2];
    for (int i = 0; i < 2; ++i)
      kept[i] = count_kept(rows, find_row(rows.windows, m + i, rows.keys.count));
    const int32_t* blocks = params.kept + m * rows.kept;
    const uint32_t common = count_common(blocks, kept[0], blocks + rows.kept, kept[1]);
    if (threadIdx.x % 32 == 0 && common * 3 >= max(kept[0], kept[1]) * 2) atomicAdd(&votes, 1U);
  }
  __syncthreads();
  return votes * 2 >= kSampledPairs;
}

}  // namespace hisa::cuda::sm90
