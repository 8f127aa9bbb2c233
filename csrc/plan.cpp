#include "plan.h"

#include <algorithm>

namespace hisa {

KeyCounts count_keys(const Shape& shape, bool causal) {
  const int64_t size = std::max<int64_t>(shape.block_size, 1);
  int64_t blocks = 0;  // pooled keys scored
  int64_t tokens = 0;  // keys scored
  const auto add_row = [&](int64_t window, int64_t times) {
    const int64_t met = shape.flat() ? 0 : (window + size - 1) / size;
    const bool prunes = !shape.flat() && met > shape.block_topk;
    blocks += prunes && shape.block_topk > 2 ? times * (met - 2) : 0;
    tokens += times * (prunes ? std::min(window, shape.block_topk * size) : window);
  };
  if (causal)
    for (int64_t m = 0; m < shape.rows; ++m)
      add_row(std::clamp<int64_t>(shape.keys - shape.rows + m + 1, 0, shape.keys), 1);
  else
    add_row(shape.keys, shape.rows);

  KeyCounts counts;
  const auto add = [&](const char* stage, int64_t keys) {
    if (keys > 0) counts.emplace_back(stage, keys);
  };
  if (!shape.flat() && !shape.pooled) add("pool", shape.keys);
  add("coarse", blocks);
  add(shape.flat() ? "flat" : "refine", tokens);
  return counts;
}

int64_t pooled_bytes(const Shape& shape) {
  return shape.slots() *
         (shape.dim * element_size(shape.type) + static_cast<int64_t>(sizeof(float)));
}

}  // namespace hisa
