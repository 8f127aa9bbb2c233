// How the CPU path cuts a call into groups, and the memory that takes.
#pragma once

#include "../plan.h"
#include "group.h"

namespace hisa::cpu {

struct Plan {
  int64_t threads;
  int64_t groups;
  int64_t parts;          // of a group, a thread's each; more than 1 where there are few groups
  int64_t coarse_parts;   // of its blocks, up to as many
  GroupSizes sizes;       // of one group
  int64_t thread_bytes;   // scratch memory of a place
  int64_t pooled_bytes;   // 0 if pooled keys are given
  // Groups, or parts of them, that have memory of their own.
  int64_t places() const { return parts == 1 ? threads : groups * parts; }
  int64_t workspace() const { return places() * thread_bytes + pooled_bytes; }
};

Plan make_plan(const Shape& shape, int64_t max_threads);

// Cut every group into so many parts, whatever it is worth; 0: as at first. For tests.
void set_parts(int64_t parts);

}  // namespace hisa::cpu
