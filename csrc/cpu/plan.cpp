#include "plan.h"

#include <algorithm>
#include <atomic>

namespace hisa::cpu {
namespace {

constexpr int64_t kGroupsPerThread = 4;  // enough for the threads to finish together
constexpr int64_t kPartWork = 1 << 20;  // multiply-adds that are worth a thread: 15 to 30 us
std::atomic<int64_t> forced_parts{0};

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Blocks and tokens of a row that are kept or looked at, at most.
int64_t kept_blocks(const Shape& shape) { return std::min(shape.block_topk, shape.slots()); }
int64_t tokens(const Shape& shape) {
  return shape.flat() ? shape.keys : std::min(kept_blocks(shape) * shape.block_size, shape.keys);
}

// Keys of buffer that one row's selector needs, for blocks and for tokens.
int64_t selector_keys(const Shape& shape) {
  const int64_t of_tokens = Selector::capacity(shape.topk, tokens(shape));
  if (shape.flat()) return of_tokens;
  return std::max(of_tokens, Selector::capacity(kept_blocks(shape), shape.slots()));
}

}  // namespace

Plan make_plan(const Shape& shape, int64_t max_threads) {
  const int64_t wanted = ceil_div(shape.rows, kGroupsPerThread * max_threads);
  const int64_t rows = std::clamp<int64_t>(wanted, 1, kGroupRows);
  Plan plan{};
  plan.groups = ceil_div(shape.rows, rows);
  plan.sizes = {.rows = rows,
                .heads = shape.heads,
                .dim = shape.dim,
                .selector_keys = selector_keys(shape),
                .blocks = std::min(shape.block_topk, shape.slots())};
  plan.forced = forced_parts > 0;
  plan.parts = plan.forced ? forced_parts.load() : max_threads / std::max<int64_t>(plan.groups, 1);
  plan.parts = std::max<int64_t>(plan.parts_for(tokens(shape)), 1);
  plan.threads = std::min(max_threads, plan.groups * plan.parts);
  plan.place_bytes = plan.sizes.bytes();
  plan.pooled_bytes = pooled_bytes(shape);
  return plan;
}

int64_t Plan::parts_for(int64_t keys) const {
  if (forced) return parts;
  return std::min(parts, std::max<int64_t>(keys * sizes.heads * sizes.dim / kPartWork, 1));
}

void set_parts(int64_t parts) { forced_parts = parts; }

}  // namespace hisa::cpu

hisa::CallPlan hisa::plan_cpu(const Shape& shape, int64_t threads) {
  return {std::string("cpu/") + cpu::kernels().name, cpu::make_plan(shape, threads).workspace()};
}
