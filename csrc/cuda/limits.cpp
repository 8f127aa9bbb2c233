#include "limits.h"

#include <utility>

namespace hisa::cuda {

cudaError_t get_limits(int device, DeviceLimits& limits) {
  thread_local DeviceLimits last{0, 0, 0, 0, -1};
  if (last.device == device) {
    limits = last;
    return cudaSuccess;
  }
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
  limits.device = device;
  last = limits;
  return cudaSuccess;
}

}  // namespace hisa::cuda
