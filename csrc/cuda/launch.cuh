// How a kernel is launched: so many blocks of threads, with so many bytes of shared memory each.
// Or so that it may overlap the end of the kernel before, which it has to wait for: see
// ptx/overlap.cuh.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace hisa::cuda {

template <class Params>
cudaError_t launch_blocks(void (*kernel)(Params), int64_t blocks, int threads, int64_t shared,
                          const Params& params, cudaStream_t stream) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, params);
}

// Whether this kernel's code for the current device has the instructions to overlap another. A
// thread asks once for each kernel and device.
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
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  bool can = false;
  if (const cudaError_t error = can_overlap<kKernel>(can)) return error;
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
