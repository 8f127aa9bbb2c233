// What the launchers of DeepGEMM's kernels have in common: descriptions of tensors for the copy
// engine, as DeepGEMM's host code makes them (csrc/jit_kernels/impls/runtime_utils.hpp).
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace {

constexpr const char* kNoEncoder = "the driver has no cuTensorMapEncodeTiled";
constexpr const char* kBadMap = "cuTensorMapEncodeTiled refused a tensor";

constexpr auto kBytes = CU_TENSOR_MAP_DATA_TYPE_UINT8;
constexpr auto kFloats = CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
constexpr auto kSwizzle = CU_TENSOR_MAP_SWIZZLE_128B;
constexpr auto kPlain = CU_TENSOR_MAP_SWIZZLE_NONE;

using Encoder = decltype(&cuTensorMapEncodeTiled);

// From the runtime, so that nothing has to be linked with the driver; null if there is none.
Encoder find_encoder() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
  const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function,
                                                             12000, cudaEnableDefault, &found);
  const bool ok = error == cudaSuccess && found == cudaDriverEntryPointSuccess;
  return ok ? reinterpret_cast<Encoder>(function) : nullptr;
}

// Of two dimensions, or of three where there is a third size; the innermost one first.
struct Tiled {
  const void* data;
  CUtensorMapDataType type;
  cuuint64_t sizes[3];
  cuuint64_t strides[2];  // bytes, of the second dimension and of the third
  cuuint32_t tile[3];
  CUtensorMapSwizzle swizzle;
};

bool describe(Encoder encode, const Tiled& t, CUtensorMap* map) {
  const cuuint32_t steps[3] = {1, 1, 1};
  return encode(map, t.type, t.sizes[2] == 0 ? 2 : 3, const_cast<void*>(t.data), t.sizes, t.strides,
                t.tile, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, t.swizzle,
                CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

}  // namespace
