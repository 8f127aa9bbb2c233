// Stage `place`: physical places instead of positions, for kernels that read a paged cache as a
// whole.
#include "stages.h"

namespace hisa::cpu {

void place(const PagedIndexParams& params, int64_t begin, int64_t end) {
  const PagedKeys& keys = params.keys;
  for (int64_t m = begin; m < end; ++m) {
    int32_t* indices = params.output.indices + m * params.output.topk;
    for (int64_t j = 0; j < params.output.topk && indices[j] >= 0; ++j) {
      const int64_t page = keys.table.page(m / params.windows.next_n, indices[j] / keys.page_size);
      indices[j] = static_cast<int32_t>(page * keys.page_size + indices[j] % keys.page_size);
    }
  }
}

}  // namespace hisa::cpu
