// The flat indexer: score every token of the window, keep the best topk.
//
// The arithmetic and the selection are those of refine, so that where HISA keeps every block the
// two agree to the bit.
#include "stages.h"

namespace hisa::cpu {

void flat(const FlatParams& params, Group& group) {
  Spans spans{};
  for (int64_t i = 0; i < group.count(); ++i) {
    const Row& row = group.row(i);
    group.select(i, params.output.topk);
    if (row.empty()) continue;
    if (params.output.scores == nullptr && row.end - row.start <= params.output.topk)
      group.selector(i).take(row.end - row.start, 0);  // all fit: nothing has to be scored
    else
      spans[static_cast<size_t>(i)] = {row.start, row.end, row.start};
  }
  group.scan(params.keys, spans);
}

}  // namespace hisa::cpu
