// Stage `refine`: score the tokens of the kept blocks exactly as flat does, keep the best topk.
//
// The group's rows walk through the union of their blocks together, so that a block which several
// of them keep is read once.
#include <algorithm>
#include <array>
#include <limits>

#include "stages.h"

namespace hisa::cpu {
namespace {

// The part of the block at `start` that lies in the row's window.
Span in_window(const Row& row, int64_t start, int64_t block_size) {
  return {std::max(start, row.start), std::min(start + block_size, row.end), row.start};
}

// True if the row's candidates all fit in the output: then nothing has to be scored.
template <class Params>
bool take_all(const Params& params, Group& group, int64_t i) {
  if (params.output.scores != nullptr) return false;
  int64_t candidates = 0;
  for (int64_t j = 0; j < group.block_count(i); ++j) {
    const Span span = in_window(group.row(i), group.blocks(i)[j], params.block_size);
    candidates += span.end - span.begin;
  }
  if (candidates > params.output.topk) return false;
  const Segment share = group.part().share(0, group.block_count(i));
  for (int64_t j = share.begin; j < share.end; ++j) {
    const Span span = in_window(group.row(i), group.blocks(i)[j], params.block_size);
    group.selector(i).take(span.end - span.begin, span.begin - span.first);
  }
  return true;
}

}  // namespace

template <class Params>
void refine(const Params& params, Group& group) {
  constexpr int64_t kDone = std::numeric_limits<int64_t>::max();
  std::array<Segment, kGroupRows> left{};  // of each row's blocks
  for (int64_t i = 0; i < group.count(); ++i) {
    group.select(i, params.output.topk);
    if (!take_all(params, group, i))
      left[static_cast<size_t>(i)] = group.part().share(0, group.block_count(i));
  }
  const auto next_block = [&](int64_t i) {
    const Segment& numbers = left[static_cast<size_t>(i)];
    return numbers.begin < numbers.end ? group.blocks(i)[numbers.begin] : kDone;
  };

  const auto next_start = [&] {
    int64_t start = kDone;
    for (int64_t i = 0; i < group.count(); ++i) start = std::min(start, next_block(i));
    return start;
  };

  for (int64_t start = next_start(), next; start != kDone; start = next) {
    Spans spans{};
    int64_t end = 0;
    for (int64_t i = 0; i < group.count(); ++i) {
      if (next_block(i) != start) continue;
      const Span span = in_window(group.row(i), start, params.block_size);
      spans[static_cast<size_t>(i)] = span;
      end = std::max(end, span.end);
      ++left[static_cast<size_t>(i)].begin;
    }
    next = next_start();
    const Segment ahead =
        next == kDone ? Segment{}
                      : Segment{next, std::min(next + params.block_size, params.keys.count)};
    for (int64_t tile = start; tile < end; tile += kTileKeys)
      group.scan_tile(params.keys, tile, std::min(tile + kTileKeys, end), spans, ahead);
  }
}

template void refine(const IndexParams&, Group&);
template void refine(const PagedIndexParams&, Group&);

}  // namespace hisa::cpu
