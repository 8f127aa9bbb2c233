#pragma once

#include <cuda.h>

namespace hisa::cuda::ptx {

inline uint32_t this_thread() { return threadIdx.x; }
inline float here(float x) { return x; }
inline void sync_warpgroup() { simt::Block::current().sync(1, 128); }

}  // namespace hisa::cuda::ptx
