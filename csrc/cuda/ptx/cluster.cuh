// Blocks of threads that run together and reach each other's shared memory. PTX ISA, "Parallel
// Synchronization: barrier.cluster", "Data Movement and Conversion: mapa, cp.async.bulk". sm_90.
#pragma once

#include <cstdint>

#include "mbarrier.cuh"

namespace hisa::cuda::ptx {

// This block's number in its cluster.
__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// All threads of all blocks arrive once for each time that they wait. It tells only that they have;
// of what they wrote before, peers see barriers that fence_barrier_init() follows.
__device__ __forceinline__ void arrive_at_cluster() {
  __syncwarp();
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
__device__ __forceinline__ void wait_for_cluster() {
  __syncwarp();
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// The address, in the shared memory of another block, of what lies at this one in one's own.
__device__ __forceinline__ uint32_t address_in(uint32_t rank, uint32_t address) {
  uint32_t mapped;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(mapped) : "r"(address), "r"(rank));
  return mapped;
}

// Copy to the same place in another block's shared memory, and count the bytes at its barrier.
// Address and size are multiples of 16.
__device__ __forceinline__ void copy_to_peer(uint32_t rank, const void* data, uint32_t bytes,
                                             Barrier& done) {
  const uint32_t from = shared_address(data);
  asm volatile(
      "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, "
      "[%3];" ::"r"(address_in(rank, from)),
      "r"(from), "r"(bytes), "r"(address_in(rank, shared_address(&done)))
      : "memory");
}

}  // namespace hisa::cuda::ptx
