// What of a GPU decides about a launch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace hisa::cuda {

struct DeviceLimits {
  int capability;        // 80 for 8.0
  int multiprocessors;
  int64_t shared_total;  // bytes of shared memory of a multiprocessor
  int64_t shared_block;  // that one block can have
  int device;            // its number
};

// A thread asks a device once.
cudaError_t get_limits(int device, DeviceLimits& limits);

// Let blocks of a kernel have as much shared memory as the current device has. A thread sets it
// once for each kernel and device. NOTE: always all of it. The limit belongs to the kernel, so that
// a call with less would lower it for another thread's, in between.
template <auto* kKernel>
cudaError_t allow_shared(int device, int64_t bytes) {
  thread_local int last = -1;
  if (last == device) return cudaSuccess;
  const cudaError_t error = cudaFuncSetAttribute(
      kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  if (error == cudaSuccess) last = device;
  return error;
}

}  // namespace hisa::cuda
