#pragma once

#include <cuda.h>

namespace hisa::cuda::ptx {

template <int kStart, int kCount>
void set_registers() {}
inline void sync_warpgroup(uint32_t number) { simt::Block::current().sync(number + 1, 128); }

}  // namespace hisa::cuda::ptx
