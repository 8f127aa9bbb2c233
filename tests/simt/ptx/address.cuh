#pragma once

#include <cuda.h>

namespace hisa::cuda::ptx {

inline const char* row_at(const char* base, uint32_t index, uint32_t stride) {
  return base + uint64_t{index} * stride;
}

}  // namespace hisa::cuda::ptx
