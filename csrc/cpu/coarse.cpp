// Stage `coarse`: score one pooled key per complete block, keep the best block_topk blocks.
//
// The first and the last block that meet the window are always kept. Only these two can be cut by
// the window or by the segment's end, so every block that is scored here is complete.
#include <algorithm>

#include "stages.h"

namespace hisa::cpu {

template <class Params>
void coarse(const Params& params, Group& group) {
  const int64_t size = params.block_size;
  Spans spans{};
  for (int64_t i = 0; i < group.count(); ++i) {
    const Row& row = group.row(i);
    if (row.empty()) continue;
    const int64_t first = row.block(row.start, size);
    const int64_t last = row.block(row.end - 1, size);
    if (last - first < params.block_topk) continue;
    const int64_t shift = (row.origin + size - 1) / size;  // slot of the segment's block 0
    const Segment share = group.part().share(shift + first + 1, shift + last);
    if (params.block_topk > 2)
      spans[static_cast<size_t>(i)] = {share.begin, share.end, shift + first + 1};
    group.select(i, params.block_topk - 2);
  }
  group.scan(params.pooled, spans);
}

template <class Params>
void list_blocks(const Params& params, Group& group) {
  const int64_t size = params.block_size;
  for (int64_t i = 0; i < group.count(); ++i) {
    const Row& row = group.row(i);
    if (row.empty()) continue;
    const int64_t first = row.block(row.start, size);
    const int64_t last = row.block(row.end - 1, size);
    const bool all = last - first < params.block_topk;
    const int64_t inner = all ? std::max<int64_t>(last - first - 1, 0) : group.selector(i).finish();
    int64_t* block = group.blocks(i);
    *block++ = row.origin + first * size;
    for (int64_t j = 0; j < inner; ++j) {
      const int64_t number = first + 1 + (all ? j : group.selector(i).position(j));
      *block++ = row.origin + number * size;
    }
    if (last > first) *block++ = row.origin + last * size;
    group.block_count(i) = block - group.blocks(i);
  }
}

template void coarse(const IndexParams&, Group&);
template void coarse(const PagedIndexParams&, Group&);
template void list_blocks(const IndexParams&, Group&);
template void list_blocks(const PagedIndexParams&, Group&);

}  // namespace hisa::cpu
