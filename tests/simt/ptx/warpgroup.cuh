#pragma once

#include <cuda.h>

namespace hisa::cuda::ptx {

template <uint32_t kCount>
void shrink_registers() {}
template <uint32_t kCount>
void grow_registers() {}
inline void wait_for_previous_kernel() {}
inline void let_next_kernel_start() {}

}  // namespace hisa::cuda::ptx
