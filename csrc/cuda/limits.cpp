#include "limits.h"

#include <utility>

namespace hisa::cuda {

cudaError_t get_limits(int device, DeviceLimits& limits) {
  int major = 0;
  int minor = 0;
  int total = 0;
  int block = 0;
  const std::pair<int*, cudaDeviceAttr> wanted[] = {
      {&major, cudaDevAttrComputeCapabilityMajor},
      {&minor, cudaDevAttrComputeCapabilityMinor},
      {&limits.multiprocessors, cudaDevAttrMultiProcessorCount},
      {&total, cudaDevAttrMaxSharedMemoryPerMultiprocessor},
      {&block, cudaDevAttrMaxSharedMemoryPerBlockOptin}};
  for (const auto& [value, attribute] : wanted)
    if (const cudaError_t error = cudaDeviceGetAttribute(value, attribute, device)) return error;
  limits.capability = 10 * major + minor;
  limits.shared_total = total;
  limits.shared_block = block;
  return cudaSuccess;
}

}  // namespace hisa::cuda
