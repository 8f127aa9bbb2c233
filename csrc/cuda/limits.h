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
};

cudaError_t get_limits(int device, DeviceLimits& limits);

}  // namespace hisa::cuda
