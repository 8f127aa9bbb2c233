#include "plan.h"

#include <algorithm>

namespace hisa {

namespace {

// Sums over the windows of 1, 2, ... `longest` tokens of the keys that are scored for one row.
struct Sums {
  const Shape& shape;

  // f(1) + ... + f(n) for f(i) = ceil(i / size).
  static int64_t ceilings(int64_t n, int64_t size) {
    const int64_t whole = n / size;
    return size * (whole * (whole + 1) / 2) + n % size * (whole + 1);
  }
  // Tokens in the kept blocks at most; a window is pruned if it has more.
  int64_t budget() const {
    return shape.flat() ? shape.keys : std::min(shape.block_topk, shape.slots()) * shape.block_size;
  }
  int64_t tokens(int64_t longest) const {
    const int64_t whole = std::min(longest, budget());
    return whole * (whole + 1) / 2 + (longest - whole) * budget();
  }
  // Blocks between the first and the last.
  int64_t blocks(int64_t longest) const {
    if (shape.flat() || shape.block_topk <= 2 || longest <= budget()) return 0;
    return ceilings(longest, shape.block_size) - ceilings(budget(), shape.block_size) -
           2 * (longest - budget());
  }
};

}  // namespace

KeyCounts count_keys(const Shape& shape, bool causal) {
  const Sums sums{shape};
  // Windows of `shorter` + 1 to N tokens, or `times` windows of N tokens.
  const int64_t shorter = std::max<int64_t>(causal ? shape.keys - shape.rows : shape.keys - 1, 0);
  const int64_t times = causal ? 1 : shape.rows;

  KeyCounts counts;
  const auto add = [&](const char* stage, int64_t keys) {
    if (keys > 0) counts.emplace_back(stage, keys);
  };
  if (shape.pools()) add("pool", shape.keys);
  if (shape.keys > 0) {
    add("coarse", times * (sums.blocks(shape.keys) - sums.blocks(shorter)));
    add(shape.flat() ? "flat" : "refine", times * (sums.tokens(shape.keys) - sums.tokens(shorter)));
  }
  return counts;
}

int64_t pooled_bytes(const Shape& shape) {
  if (!shape.pools()) return 0;
  return shape.slots() *
         (shape.dim * element_size(shape.type) + static_cast<int64_t>(sizeof(float)));
}

}  // namespace hisa
