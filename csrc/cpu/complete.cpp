#include "../complete.h"

#include "around.h"

namespace hisa::cpu {

void complete(const CompleteParams& params, int64_t begin, int64_t end) {
  for (int64_t m = begin; m < end; ++m) {
    int32_t* const row = params.indices + m * params.topk;
    const CompleteWindow window(params, m);
    const int64_t count = count_selected(row, params.topk);
    for (int64_t i = count; i < params.topk; ++i)
      row[i] = static_cast<int32_t>(filler(row, count, i - count, window, params.keys));
    for (int64_t i = 0; i < count; ++i) row[i] += static_cast<int32_t>(window.start);
  }
}

}  // namespace hisa::cpu
