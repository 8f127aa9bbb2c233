// Barriers in shared memory on which threads and bulk copies arrive. PTX ISA, "Parallel
// Synchronization and Communication Instructions: mbarrier". sm_90.
#pragma once

#include <cstdint>

#include "shared.cuh"

namespace hisa::cuda::ptx {

// One lane arrives for its warp. racecheck takes that for a barrier of this lane alone, so for it
// (HISA_RACECHECK) all of them do.
#ifdef HISA_RACECHECK
inline constexpr uint32_t kArrivals = 32;
#else
inline constexpr uint32_t kArrivals = 1;
#endif

// Completes a phase once `warps` warps have arrived and all bytes expected are there.
struct Barrier {
  uint64_t state;

  __device__ void init(uint32_t warps) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(this)),
                 "r"(warps * kArrivals));
  }
  // All lanes of a warp call these two.
  __device__ void arrive() {
    __syncwarp();
    if (kArrivals > 1 || threadIdx.x % 32 == 0) arrive_alone();
  }
  __device__ void arrive_and_expect(uint32_t bytes) {
    __syncwarp();
    if (threadIdx.x % 32 == 0)
      asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(shared_address(this)),
                   "r"(bytes)
                   : "memory");
    else if (kArrivals > 1)
      arrive_alone();
    __syncwarp();
  }
  // Wait for the end of a phase: the first one has parity 0, the next 1, then 0 again. The phase
  // before the first one, of parity 1, counts as ended.
  __device__ void wait(uint32_t parity) {
    const uint32_t address = shared_address(this);
    uint32_t done = 0;
    do {
      asm volatile(
          "{ .reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2; "
          "selp.u32 %0, 1, 0, p; }"
          : "=r"(done)
          : "r"(address), "r"(parity)
          : "memory");
    } while (done == 0);
  }

 private:
  __device__ void arrive_alone() {
    asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(shared_address(this)) : "memory");
  }
};

// Between what this thread read and wrote in shared memory before, and what the copy engine and
// products ("the async proxy") read and write there after.
__device__ __forceinline__ void fence_async() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// What was initialised is seen by bulk copies.
__device__ __forceinline__ void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

}  // namespace hisa::cuda::ptx
