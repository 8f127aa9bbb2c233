// How a portable kernel is launched so that it may overlap the end of the kernel before, where its
// code has the instructions to wait for that.
#pragma once

#include "launch.cuh"

namespace hisa::cuda {

// Whether this kernel's code for the current device has them. A thread asks again only when its
// device changes.
template <auto* kKernel>
cudaError_t can_overlap(bool& can) {
  thread_local int last = -1;
  thread_local bool known = false;
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device)) return error;
  if (device != last) {
    cudaFuncAttributes attributes{};
    if (const cudaError_t error = cudaFuncGetAttributes(&attributes, kKernel)) return error;
    known = attributes.ptxVersion >= 90 && attributes.binaryVersion >= 90;
    last = device;
  }
  can = known;
  return cudaSuccess;
}

template <auto* kKernel, class... Arguments>
cudaError_t launch_overlapping(dim3 grid, int threads, int64_t shared, cudaStream_t stream,
                               const Arguments&... arguments) {
  bool can = false;
  if (const cudaError_t error = can_overlap<kKernel>(can)) return error;
  cudaLaunchAttribute overlap = may_overlap();
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared);
  config.stream = stream;
  config.attrs = &overlap;
  config.numAttrs = can ? 1 : 0;
  return cudaLaunchKernelEx(&config, kKernel, arguments...);
}

}  // namespace hisa::cuda
