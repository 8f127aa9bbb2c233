// How the CPU path cuts a call into groups, and the memory that takes.
#pragma once

#include "../plan.h"
#include "group.h"

namespace hisa::cpu {

struct Plan {
  int64_t threads;
  int64_t groups;
  GroupSizes sizes;       // of one group
  int64_t thread_bytes;   // scratch memory per thread
  int64_t pooled_bytes;   // 0 if pooled keys are given
  int64_t workspace() const { return threads * thread_bytes + pooled_bytes; }
};

Plan make_plan(const Shape& shape, int64_t max_threads);

}  // namespace hisa::cpu
