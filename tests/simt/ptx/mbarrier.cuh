#pragma once

#include <cuda.h>

#include "shared.cuh"

namespace hisa::cuda::ptx {

struct Barrier {
  uint64_t state;

  void init(uint32_t count) { simt::Block::current().phases(this) = {count, count, 0, 0}; }
  void arrive() {
    __syncwarp();
    if (threadIdx.x % 32 == 0) arrive_alone();
  }
  void arrive_and_expect(uint32_t bytes) {
    __syncwarp();
    if (threadIdx.x % 32 == 0) {
      simt::Block::current().phases(this).bytes += bytes;
      arrive_alone();
    }
    __syncwarp();
  }
  void arrive_alone() {
    auto& block = simt::Block::current();
    auto& phases = block.phases(this);
    if (phases.missing == 0) block.fail("one arrival too many");
    --phases.missing;
    block.complete_if(phases);
  }
  // True for the phase before the one at hand, too, as on the GPU.
  void wait(uint32_t parity) {
    auto& phases = simt::Block::current().phases(this);
    simt::Block::current().wait([&phases, parity] { return phases.phase % 2 != parity; });
  }
};

inline void fence_async() {}
inline void fence_barrier_init() {}

}  // namespace hisa::cuda::ptx
