// How a kernel is launched: so many blocks of threads, with so many bytes of shared memory each.
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

// The kernel may start while the one before it ends; it has to wait for that: see ptx/overlap.cuh.
inline cudaLaunchAttribute may_overlap() {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  return attribute;
}

}  // namespace hisa::cuda
