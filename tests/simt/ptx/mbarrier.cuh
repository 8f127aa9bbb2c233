#pragma once

#include <cuda.h>

#include "shared.cuh"

namespace hisa::cuda::ptx {

struct Barrier {
  uint64_t state;

  void init(uint32_t count) { simt::Block::current().phases(this) = {count, count, 0, 0}; }
  void arrive() {
    auto& block = simt::Block::current();
    auto& phases = block.phases(this);
    if (phases.missing == 0) block.fail("one arrival too many");
    --phases.missing;
    block.complete_if(phases);
  }
  void arrive_and_expect(uint32_t bytes) {
    simt::Block::current().phases(this).bytes += bytes;
    arrive();
  }
  // True for the phase before the one at hand, too, as on the GPU.
  void wait(uint32_t parity) {
    auto& phases = simt::Block::current().phases(this);
    simt::Block::current().wait([&phases, parity] { return phases.phase % 2 != parity; });
  }
};

inline void fence_barrier_init() {}

}  // namespace hisa::cuda::ptx
