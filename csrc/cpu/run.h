// Runs a call's groups of rows on torch's threads.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>

#include "float_environment.h"
#include "plan.h"

namespace hisa::cpu {

// Call `stages(group)` for every group of the call's rows and store what it selected. Threads take
// the next group when they are done with one, the last rows first: their windows are the longest.
template <class Params, class Stages>
void run_groups(const Plan& plan, const Params& params, const Stages& stages) {
  const at::Tensor memory = at::empty({plan.threads * plan.thread_bytes}, at::kByte);
  auto* const base = static_cast<std::byte*>(memory.mutable_data_ptr());
  std::atomic<int64_t> taken{0};
  InterruptPoll poll;
  at::parallel_for(0, plan.threads, 1, [&](int64_t first_thread, int64_t end_thread) {
    const FloatEnvironment environment;
    for (int64_t thread = first_thread; thread < end_thread; ++thread) {
      Group group(plan.sizes, base + thread * plan.thread_bytes, poll);
      for (int64_t i = taken++; i < plan.groups && !poll.stop(); i = taken++) {
        const int64_t first = (plan.groups - 1 - i) * plan.sizes.rows;
        const int64_t count = std::min(plan.sizes.rows, params.queries.rows - first);
        group.begin(params, first, count);
        stages(group);
        group.store(params.output);
      }
    }
  });
  poll.raise_if_stopped();
}

}  // namespace hisa::cpu
