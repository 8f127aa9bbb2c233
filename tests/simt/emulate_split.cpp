// The kernel for few rows, as emulate.cpp has those for many. All blocks of a cluster have the same
// queries, so only what lies behind them is each block's own.
#include <cuda_runtime_api.h>

#include "cuda/sm90/split.h"

namespace hisa::cuda::sm90 {
inline SplitParams for_peer(SplitParams params, uint32_t rank);
}

#include "cuda/sm90/split.cpp"
#include "cuda/sm90/split_bf16.cu"
#include "cuda/sm90/split_fp8.cu"

namespace hisa::cuda::sm90 {
SplitParams for_peer(SplitParams params, uint32_t rank) {
  SplitLayout& at = params.at;
  for (int64_t* part : {&at.keys, &at.scale, &at.slots, &at.tokens, &at.blocks, &at.shared})
    *part += rank * kSharedBytes;
  return params;
}
}  // namespace hisa::cuda::sm90
