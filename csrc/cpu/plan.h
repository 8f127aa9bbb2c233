// How the CPU path cuts a call into groups, and the memory that takes.
#pragma once

#include "../plan.h"
#include "group.h"

namespace hisa::cpu {

struct Plan {
  int64_t threads;
  int64_t groups;
  int64_t parts;  // of each group, at most: more than 1 where there are two threads for it or more
  bool forced;  // whether as many, whatever they are worth
  GroupSizes sizes;  // of one group
  int64_t place_bytes;  // scratch memory of a place
  int64_t pooled_bytes;  // 0 if pooled keys are given

  // Threads that take one group after the other, or all parts of all groups: what has memory.
  int64_t places() const { return parts == 1 ? threads : groups * parts; }
  int64_t workspace() const { return places() * place_bytes + pooled_bytes; }
  // Into how many parts to cut the scoring of so many keys for a row.
  int64_t parts_for(int64_t keys) const;
};

Plan make_plan(const Shape& shape, int64_t max_threads);

// Cut every group into so many parts, whatever they are worth; 0: as at first. For tests.
void set_parts(int64_t parts);

}  // namespace hisa::cpu
