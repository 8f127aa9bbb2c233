// How the kernel of few rows is launched.
#pragma once

#include <algorithm>
#include <iterator>
#include <utility>

#include "../launch.cuh"
#include "split.cuh"

namespace hisa::cuda::sm90 {

// A launch of clusters of so many blocks.
template <class C>
class SplitLaunch {
 public:
  SplitLaunch(const SplitPlan& plan, int64_t rows, uint32_t peers, cudaStream_t stream) {
    attributes_[1].id = cudaLaunchAttributeClusterDimension;
    attributes_[1].val.clusterDim = {peers, 1, 1};
    config_.gridDim = dim3(static_cast<unsigned>(rows * peers));
    config_.blockDim = dim3(C::kThreads);
    config_.dynamicSmemBytes = static_cast<size_t>((peers == 1 ? plan.alone : plan.together).total);
    config_.stream = stream;
    config_.attrs = attributes_;
    config_.numAttrs = 2;
  }
  const cudaLaunchConfig_t& config() const { return config_; }

 private:
  cudaLaunchAttribute attributes_[2] = {may_overlap(), {}};
  cudaLaunchConfig_t config_{};
};

// Blocks of a cluster: as many as leave room for all clusters at the same time. A thread prepares
// the device that it works on once.
template <class C>
cudaError_t find_peers(const SplitPlan& plan, int64_t rows, uint32_t& peers) {
  thread_local int device = -1;
  thread_local int clusters[kMostPeers + 1];  // that there is room for, of each size
  if (device != plan.device) {
    constexpr auto of = split_kernel<C>;
    if (const auto error = allow_shared<of>(plan.device, plan.shared_limit)) return error;
    if (const auto error =
            cudaFuncSetAttribute(of, cudaFuncAttributeNonPortableClusterSizeAllowed, 1))
      return error;
    for (uint32_t size = 2; size <= kMostPeers; ++size) {
      const SplitLaunch<C> launch(plan, 1, size, nullptr);
      if (cudaOccupancyMaxActiveClusters(&clusters[size], of, &launch.config()) == cudaSuccess)
        continue;
      clusters[size] = 0;  // a size that this device, or this part of one, cannot have
      cudaGetLastError();
    }
    device = plan.device;
  }
  peers = static_cast<uint32_t>(std::min<int64_t>(kMostPeers, plan.tiles));
  while (peers > 1 && clusters[peers] < rows) --peers;
  return cudaSuccess;
}

template <class C>
cudaError_t launch_split_kernel(SplitParams params, const SplitPlan& plan, cudaStream_t stream) {
  if (const auto error = find_peers<C>(plan, params.queries.rows, params.peers)) return error;
  params.at = params.peers == 1 ? plan.alone : plan.together;
  const SplitLaunch<C> launch(plan, params.queries.rows, params.peers, stream);
  return cudaLaunchKernelEx(&launch.config(), split_kernel<C>, params);
}

template <ElementType kType>
cudaError_t launch_split_of(const SplitParams& params, const SplitPlan& plan, int64_t dim,
                            cudaStream_t stream) {
  cudaError_t error = cudaErrorInvalidValue;
  [&]<size_t... i>(std::index_sequence<i...>) {
    ((kVariants[i].heads == params.queries.heads && kVariants[i].dim == dim
          ? void(error =
                     launch_split_kernel<SplitConfig<kType, kVariants[i].heads, kVariants[i].dim>>(
                         params, plan, stream))
          : void()),
     ...);
  }(std::make_index_sequence<std::size(kVariants)>());
  return error;
}

}  // namespace hisa::cuda::sm90
