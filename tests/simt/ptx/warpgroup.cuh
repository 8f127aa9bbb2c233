#pragma once

#include <cuda.h>

namespace hisa::cuda::ptx {

template <int kStart, int kCount>
void set_registers() {}
inline void sync_warpgroup(uint32_t number) { simt::Block::current().sync(number + 1, 128); }
inline void wait_for_previous_kernel() {}
inline void let_next_kernel_start() {}

}  // namespace hisa::cuda::ptx
