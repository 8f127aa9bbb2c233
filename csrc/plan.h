// What a call costs before it runs: sizes, workspace and operations. The entry functions allocate
// what is planned here, so the plan that users see is the truth.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "params.h"

namespace hisa {

struct Shape {
  int64_t rows;   // M
  int64_t keys;   // N
  int64_t heads;  // H
  int64_t dim;    // D
  ElementType type;
  int64_t topk;
  int64_t block_size;  // 0: flat
  int64_t block_topk;  // 0: flat
  bool pooled;         // pooled keys are given

  bool flat() const { return block_size == 0; }
  // Whether the window of some row may meet more blocks than it keeps.
  bool prunes() const { return slots() > block_topk; }
  bool pools() const { return !pooled && prunes(); }  // whether pooled keys have to be made
  int64_t slots() const { return flat() ? 0 : (keys + block_size - 1) / block_size; }
};

using KeyCounts = std::vector<std::pair<std::string, int64_t>>;

// Upper bound of the keys that each stage reads (pool) or scores, in order; stages that have none
// are left out. With `causal`, row m sees keys [0, N - M + m + 1), else all of them.
KeyCounts count_keys(const Shape& shape, bool causal);

// Bytes of the pooled keys and their scales, if they are made.
int64_t pooled_bytes(const Shape& shape);

// What a call on one device runs and takes beside inputs and outputs.
struct CallPlan {
  std::string kernels;  // "device/family"
  int64_t workspace;    // bytes
};

CallPlan plan_cpu(const Shape& shape, int64_t threads);
// For the current CUDA device; ValueError in a build without CUDA kernels.
CallPlan plan_cuda(const Shape& shape);

// Which CUDA kernels may run, of those that could: the ones for Hopper, and those for few rows.
// Both may at first. For tests and benchmarks: without the ones for few rows results are the same.
void use_kernels(bool hopper, bool split);

}  // namespace hisa
