#pragma once

#include <cuda.h>

namespace hisa::cuda::ptx {

inline uint32_t this_thread() { return threadIdx.x; }
template <class T>
T here(T x) {
  return x;
}
template <int kThreads>
void sync_some() {
  simt::Block::current().sync(1, kThreads);
}

}  // namespace hisa::cuda::ptx
