// The portable kernels, as emulate.cpp has those for Hopper: for many rows, and for few.
#include <cuda_runtime_api.h>

#include <exception>
#include <vector>

namespace hisa::cuda {
extern uint4 shared[] __asm__("_ZN4hisa4cuda4sm905startE");  // sm90::start: one block at a time
}

#include "call.h"
#include "cuda/choice.h"
#include "cuda/launch.cpp"
#include "cuda/rows_bf16.cu"
#include "cuda/rows_fp16.cu"
#include "cuda/rows_fp32.cu"
#include "cuda/rows_fp8.cu"
#include "cuda/split.cu"
#include "cuda/split_bf16.cu"
#include "cuda/split_fp16.cu"
#include "cuda/split_fp32.cu"
#include "cuda/split_fp8.cu"

// 0, or 1 with a text.
extern "C" int emulate_portable(const Call* call, char* text, int64_t size) {
  using namespace hisa;
  try {
    simt::seed() = call->seed;
    cuda::use_split = call->split != 0;
    const cuda::DeviceLimits limits{80, static_cast<int>(call->multiprocessors), 167936,
                                    call->shared, 0};
    // A flat call here stands for one of those that a paged call makes.
    const auto geometry = cuda::make_geometry(call->shape(), limits, true);
    if (call->split == 1 && !geometry.splits) throw std::runtime_error("not split");
    if (geometry.shared > call->shared) throw std::runtime_error("too much shared memory");
    // NaN, and blocks far from any key.
    std::vector<uint4> workspace(static_cast<size_t>(geometry.workspace / 16 + 1),
                                 uint4{~0U, ~0U, ~0U, ~0U});
    char* at = geometry.workspace > 0 ? reinterpret_cast<char*>(workspace.data()) : nullptr;
    if (cuda::launch_rows(call->params(), geometry, at, nullptr) != cudaSuccess)
      throw std::runtime_error("not launched");
    return 0;
  } catch (const std::exception& error) {
    std::snprintf(text, static_cast<size_t>(size), "%s", error.what());
    return 1;
  }
}
