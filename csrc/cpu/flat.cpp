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
    const Segment share = group.part().share(row.start, row.end);
    if (params.output.scores == nullptr && row.end - row.start <= params.output.topk)
      group.selector(i).take(share.end - share.begin, share.begin - row.start);  // unseen: all fit
    else
      spans[static_cast<size_t>(i)] = {share.begin, share.end, row.start};
  }
  group.scan(params.keys, spans);
}

}  // namespace hisa::cpu
