// The kernel of stages `coarse`, `refine` and `flat` on Hopper.
#pragma once

#include <iterator>
#include <utility>

#include "../launch.cuh"
#include "../ptx/overlap.cuh"
#include "../ptx/warpgroup.cuh"
#include "choose.cuh"
#include "launch.h"
#include "load.cuh"
#include "score.cuh"
#include "select_chunks.cuh"
#include "select_few.cuh"

namespace hisa::cuda::sm90 {

template <class C>
__device__ __forceinline__ void run_selector(const Params& params, const Memory<C>& memory) {
  if constexpr (!C::kPairs) {
    if (params.rows.capacity > 0) return ChunkSelector<C>(params, memory).run();
    if (have_few(params)) return WarpSelector<C>(params, memory).run();
  }
  Selector<C>(params, memory).run();
}

template <class C>
__device__ __forceinline__ void run_copier(const Params& params, const Memory<C>& memory,
                                           uint32_t copier) {
  if constexpr (C::kSpan == 2)
    copy_whole_tiles<C>(params, memory, copier);
  else
    copy_tiles<C>(params, memory, copier);
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, 1) kernel(const __grid_constant__ Params params) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) char start[];
  const Memory<C> memory(start, params);
  if (threadIdx.x == 0) memory.shared.init();
  if (params.scored.scale == nullptr)
    for (uint32_t i = threadIdx.x; i < params.stages * params.boxes.tile; i += C::kThreads)
      memory.scale[i] = 1.0F;
  __syncthreads();
  ptx::let_next_kernel_start();
  ptx::wait_for_previous_kernel();
  if constexpr (C::kGroup <= 2)
    if (params.one_of_two && pairs_pay(params, memory.shared.votes) != C::kPairs) return;
  const uint32_t warpgroup = threadIdx.x / 128;
  if (warpgroup == 0) {
    ptx::set_registers<C::kStartRegisters, C::kSelectRegisters>();
    run_selector<C>(params, memory);
  } else if (warpgroup == 1) {
    ptx::set_registers<C::kStartRegisters, C::kLoadRegisters>();
    const uint32_t warp = __shfl_sync(~0U, threadIdx.x / 32 % 4, 0);  // the compiler knows, too
    if (warp < C::kCopiers)
      run_copier<C>(params, memory, warp);
    else if (warp - C::kCopiers < C::kLoaders)
      load_groups<C>(params, memory, warp - C::kCopiers);
  } else {
    ptx::set_registers<C::kStartRegisters, C::kScoreRegisters>();
    Scorer<C>(params, memory).run();
  }
#endif
}

template <class C>
cudaError_t launch(const Params& params, const Plan& plan, cudaStream_t stream) {
  constexpr auto of = kernel<C>;
  if (const auto error = allow_shared<of>(plan.device, plan.shared_limit)) return error;
  cudaLaunchAttribute overlap = may_overlap();
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(plan.grid));
  config.blockDim = dim3(C::kThreads);
  config.dynamicSmemBytes = static_cast<size_t>(plan.shared);
  config.stream = stream;
  config.attrs = &overlap;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, of, params);
}

// Call `use` with the Config of the variant and the kind of work.
template <ElementType kType, class Use>
auto with_config(int64_t heads, int64_t dim, Work work, Use use) {
  decltype(use(Config<kType, 64, 128, 1>{})) result{};
  const auto of_work = [&]<int kHeads, int kDim>() {
    if (work == Work::kRefinePairs) {
      if constexpr (has_pairs(kHeads)) result = use(Config<kType, kHeads, kDim, 2, true>{});
    } else if (work == Work::kRefinePages) {
      result = use(Config<kType, kHeads, kDim, 1, false, true>{});
    } else if (work == Work::kRefine) {
      result = use(Config<kType, kHeads, kDim, 1>{});
    } else {
      result = use(Config<kType, kHeads, kDim, group_size(kHeads, kDim, kType, Work::kFlat)>{});
    }
  };
  [&]<size_t... i>(std::index_sequence<i...>) {
    ((kVariants[i].heads == heads && kVariants[i].dim == dim
          ? of_work.template operator()<kVariants[i].heads, kVariants[i].dim>()
          : void()),
     ...);
  }(std::make_index_sequence<std::size(kVariants)>());
  return result;
}

template <ElementType kType>
cudaError_t launch_kernel(const Params& params, const Plan& plan, cudaStream_t stream) {
  return with_config<kType>(params.rows.queries.heads, params.scored.dim, plan.work,
                            [&]<class C>(C) { return launch<C>(params, plan, stream); });
}

template <ElementType kType>
Needs find_needs(int64_t heads, int64_t dim, Work work) {
  return with_config<kType>(heads, dim, work, []<class C>(C) {
    return Needs{sizeof(Shared<C>), C::kLeastStages, C::kStageStep, C::kSpan};
  });
}

}  // namespace hisa::cuda::sm90
