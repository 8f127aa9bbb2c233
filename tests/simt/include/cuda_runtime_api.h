// The runtime's part: a launch runs all blocks, one after the other, or all clusters.
#pragma once

#include <stdexcept>

#include "cuda.h"

using cudaError_t = int;
inline constexpr cudaError_t cudaSuccess = 0;
inline constexpr cudaError_t cudaErrorNotSupported = 801;
inline constexpr cudaError_t cudaErrorInvalidValue = 1;
using cudaStream_t = void*;
struct dim3 {
  unsigned x;
  explicit dim3(unsigned n = 1) : x(n) {}
};
enum {
  cudaFuncAttributeMaxDynamicSharedMemorySize,
  cudaFuncAttributeNonPortableClusterSizeAllowed,
  cudaLaunchAttributeClusterDimension,
  cudaLaunchAttributeProgrammaticStreamSerialization,
  cudaEnableDefault
};
enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess };
struct cudaLaunchAttribute {
  int id;
  struct {
    int programmaticStreamSerializationAllowed;
    struct {
      unsigned x, y, z;
    } clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

namespace simt {
// Blocks of a cluster, at most.
inline uint32_t& most_peers() {
  static uint32_t it = 1;
  return it;
}
// What the kernel gets in a block of a cluster. A kernel that runs in clusters has its own.
template <class P>
P for_peer(const P& params, uint32_t) {
  return params;
}
inline uint64_t& seed() {
  static uint64_t it = 0;
  return it;
}
inline CUresult encode(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* data,
                       const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                       const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle swizzle,
                       CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  const int64_t element = type == CU_TENSOR_MAP_DATA_TYPE_UINT8      ? 1
                          : type == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 ? 2
                                                                     : 4;
  *map = {static_cast<const char*>(data), rank, element, {1, 1, 1}, {element, 0, 0}, {1, 1, 1}};
  bool right = reinterpret_cast<uintptr_t>(data) % 16 == 0 && box[0] * element % 16 == 0;
  for (cuuint32_t d = 0; d < rank; ++d) {
    map->size[d] = static_cast<int64_t>(sizes[d]);
    map->box[d] = box[d];
    if (d > 0) map->stride[d] = static_cast<int64_t>(strides[d - 1]);
    right = right && sizes[d] > 0 && box[d] <= 256 && (d == 0 || strides[d - 1] % 16 == 0);
  }
  const int64_t row = box[0] * element;
  if (swizzle != CU_TENSOR_MAP_SWIZZLE_NONE)
    right = right && row == (swizzle == CU_TENSOR_MAP_SWIZZLE_64B ? 64 : 128);
  return right ? CUDA_SUCCESS : 1;
}
}  // namespace simt

inline cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** to, int, int,
                                                    cudaDriverEntryPointQueryResult* result) {
  *to = reinterpret_cast<void*>(&simt::encode);
  *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, int, int) {
  return cudaSuccess;
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, Kernel,
                                           const cudaLaunchConfig_t* config) {
  *clusters = config->attrs[1].val.clusterDim.x <= simt::most_peers() ? 1 << 20 : 0;
  return cudaSuccess;
}
template <class P, class A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P),
                               const A& params) {
  unsigned peers = 1;
  for (unsigned i = 0; i < config->numAttrs; ++i)
    if (config->attrs[i].id == cudaLaunchAttributeClusterDimension)
      peers = config->attrs[i].val.clusterDim.x;
  for (unsigned block = 0; block < config->gridDim.x; block += peers) {
    using simt::for_peer;
    simt::Block cluster(config->blockDim.x, block, config->gridDim.x,
                        simt::seed() * 1000003 + block, peers);
    cluster.run([&] { kernel(for_peer(params, cluster.rank())); });
  }
  return cudaSuccess;
}
