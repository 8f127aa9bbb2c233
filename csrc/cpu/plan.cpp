#include "plan.h"

#include <algorithm>

namespace hisa::cpu {
namespace {

constexpr int64_t kGroupsPerThread = 4;  // enough for the threads to finish together

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Keys of buffer that one row's selector needs, for blocks and for tokens.
int64_t selector_keys(const Shape& shape) {
  if (shape.flat()) return Selector::capacity(shape.topk, shape.keys);
  const int64_t kept = std::min(shape.block_topk, shape.slots());
  const int64_t tokens = std::min(kept * shape.block_size, shape.keys);
  return std::max(Selector::capacity(shape.topk, tokens), Selector::capacity(kept, shape.slots()));
}

}  // namespace

Plan make_plan(const Shape& shape, int64_t max_threads) {
  const int64_t wanted = ceil_div(shape.rows, kGroupsPerThread * max_threads);
  const int64_t rows = std::clamp<int64_t>(wanted, 1, kGroupRows);
  Plan plan{};
  plan.groups = ceil_div(shape.rows, rows);
  plan.threads = std::min(max_threads, plan.groups);
  plan.sizes = {.rows = rows,
                .heads = shape.heads,
                .dim = shape.dim,
                .selector_keys = selector_keys(shape),
                .blocks = std::min(shape.block_topk, shape.slots())};
  plan.thread_bytes = plan.sizes.bytes();
  plan.pooled_bytes = pooled_bytes(shape);
  return plan;
}

}  // namespace hisa::cpu

hisa::CallPlan hisa::plan_cpu(const Shape& shape, int64_t threads) {
  return {std::string("cpu/") + cpu::kernels().name, cpu::make_plan(shape, threads).workspace()};
}
