#pragma once

#include <cuda.h>

#include "mbarrier.cuh"
#include "shared.cuh"

namespace hisa::cuda::ptx {

inline uint32_t cluster_rank() { return simt::Block::current().rank(); }
inline void arrive_at_cluster() { simt::Block::current().arrive(); }
inline void wait_for_cluster() { simt::Block::current().wait_for_all(); }
inline void copy_to_peer(uint32_t rank, const void* data, uint32_t bytes, Barrier& done) {
  auto& block = simt::Block::current();
  const ptrdiff_t distance = (ptrdiff_t{rank} - block.rank()) * sm90::kSharedBytes;
  const auto* from = static_cast<const char*>(data);
  auto& phases =
      block.phases(reinterpret_cast<Barrier*>(reinterpret_cast<char*>(&done) + distance));
  if (bytes % 16 != 0 || (from - sm90::start) % 16 != 0) block.fail("16 bytes at a time");
  block.later([=, &block, &phases] {
    std::memcpy(const_cast<char*>(from) + distance, from, bytes);
    phases.bytes -= bytes;
    block.complete_if(phases);
  });
}

}  // namespace hisa::cuda::ptx
