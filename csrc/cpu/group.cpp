#include "group.h"

#include <algorithm>
#include <limits>
#include <utility>

#include "../carver.h"
#include "keys.h"

namespace hisa::cpu {
namespace {

using LineCarver = Carver<64>;  // a cache line

struct Pieces {
  float* query;
  float* packed;
  float* scores;
  uint64_t* selector_keys;
  int64_t* blocks;

  Pieces(const GroupSizes& sizes, LineCarver& carver)
      : query(carver.take<float>(sizes.rows * sizes.heads * sizes.dim)),
        packed(carver.take<float>(kTileKeys * sizes.dim)),
        scores(carver.take<float>(kTileKeys)),
        selector_keys(carver.take<uint64_t>((sizes.rows + 1) * sizes.selector_keys)),
        blocks(carver.take<int64_t>(sizes.rows * sizes.blocks)) {}
};

Row find_row(const Windows& windows, const Keys& keys, int64_t m) {
  return hisa::find_row(windows, m, keys.count);
}

}  // namespace

int64_t GroupSizes::bytes() const {
  LineCarver carver(nullptr);
  const Pieces pieces(*this, carver);
  return carver.used();
}

Group::Group(const GroupSizes& sizes, std::byte* memory, InterruptPoll& poll)
    : sizes_(sizes), kernels_(kernels()), poll_(poll) {
  LineCarver carver(memory);
  const Pieces pieces(sizes, carver);
  query_ = pieces.query;
  packed_ = pieces.packed;
  scores_ = pieces.scores;
  selector_keys_ = pieces.selector_keys;
  blocks_ = pieces.blocks;
}

template <class Params>
void Group::begin(const Params& params, int64_t first, int64_t count) {
  queries_ = params.queries;
  type_ = params.keys.type;
  first_ = first;
  count_ = count;
  loaded_ = false;
  for (int64_t i = 0; i < count; ++i) {
    rows_[static_cast<size_t>(i)] = find_row(params.windows, params.keys, first + i);
    block_count(i) = 0;
    select(i, 0);
  }
}

void Group::select(int64_t i, int64_t count) {
  selector(i).reset(selector_keys_ + i * sizes_.selector_keys,
                    selector_keys_ + sizes_.rows * sizes_.selector_keys, sizes_.selector_keys,
                    count);
}

void Group::finish() {
  for (int64_t i = 0; i < count_; ++i) selector(i).finish();
}

void Group::join(Group& later) {
  for (int64_t i = 0; i < count_; ++i) selector(i).join(later.selector(i));
}

void Group::share_blocks(const Group& first) {
  blocks_ = first.blocks_;
  block_counts_ = first.block_counts_;
}

void Group::load_queries() {
  const int64_t width = element_size(type_);
  for (int64_t i = 0; i < count_; ++i) {
    for (int64_t h = 0; h < queries_.heads; ++h) {
      const int64_t offset = (first_ + i) * queries_.row_stride + h * queries_.head_stride;
      kernels_.widen(type_, static_cast<const std::byte*>(queries_.data) + offset * width,
                     query_ + (i * queries_.heads + h) * sizes_.dim, sizes_.dim);
    }
  }
  loaded_ = true;
}

template <class AnyKeys>
void Group::scan_tile(const AnyKeys& keys, int64_t begin, int64_t end, const Spans& spans,
                      Segment ahead) {
  std::array<Segment, kGroupRows> wanted{};
  Segment all{end, begin};
  for (size_t i = 0; i < static_cast<size_t>(count_); ++i) {
    wanted[i] = {std::max(begin, spans[i].begin), std::min(end, spans[i].end)};
    if (wanted[i].begin >= wanted[i].end) continue;
    all = {std::min(all.begin, wanted[i].begin), std::max(all.end, wanted[i].end)};
  }
  if (all.begin >= all.end || poll_.stop()) return;

  if (!loaded_) load_queries();
  const Bytes next = memory(keys, ahead.begin, ahead.end);
  int64_t next_bytes = next.count;
  Located found;
  locate(keys, all.begin, all.end, found);
  kernels_.pack({.keys = found.rows.data(),
                 .count = all.end - all.begin,
                 .dim = keys.dim,
                 .type = keys.type,
                 .packed = packed_});
  for (size_t i = 0; i < static_cast<size_t>(count_) && !poll_.stop(); ++i) {
    if (wanted[i].begin >= wanted[i].end) continue;
    const int64_t panels = (wanted[i].begin - all.begin) / kernels_.panel_keys;  // not wanted
    const int64_t skipped = panels * kernels_.panel_keys;
    const int64_t start = all.begin + skipped;
    const auto r = static_cast<int64_t>(i);
    kernels_.score({
        .query = query_ + r * queries_.heads * sizes_.dim,
        .weights = queries_.weights + (first_ + r) * queries_.weights_stride,
        .packed = packed_ + skipped * keys.dim,
        .scale = found.scale == nullptr ? nullptr : found.scale + skipped,
        .heads = queries_.heads,
        .dim = keys.dim,
        .count = wanted[i].end - start,
        .scores = scores_,
        .ahead = next.data,
        .ahead_bytes = std::exchange(next_bytes, 0),
    });
    selectors_[i].offer(scores_ + (wanted[i].begin - start), wanted[i].end - wanted[i].begin,
                        wanted[i].begin - spans[i].first);
  }
}

template <class AnyKeys>
void Group::scan(const AnyKeys& keys, const Spans& spans) {
  int64_t begin = std::numeric_limits<int64_t>::max();
  int64_t end = 0;
  for (size_t i = 0; i < static_cast<size_t>(count_); ++i) {
    if (spans[i].begin >= spans[i].end) continue;
    begin = std::min(begin, spans[i].begin);
    end = std::max(end, spans[i].end);
  }
  for (int64_t tile = begin; tile < end; tile += kTileKeys)
    scan_tile(keys, tile, std::min(tile + kTileKeys, end), spans);
}

void Group::store(const Output& output) {
  for (int64_t i = 0; i < count_; ++i) {
    Selector& chosen = selector(i);
    const int64_t n = chosen.finish();
    int32_t* indices = output.indices + (first_ + i) * output.topk;
    for (int64_t j = 0; j < n; ++j) indices[j] = static_cast<int32_t>(chosen.position(j));
    std::fill(indices + n, indices + output.topk, -1);
    if (output.scores == nullptr) continue;
    float* scores = output.scores + (first_ + i) * output.topk;
    for (int64_t j = 0; j < n; ++j) scores[j] = chosen.score(j);
    std::fill(scores + n, scores + output.topk, -std::numeric_limits<float>::infinity());
  }
}

template void Group::begin(const IndexParams&, int64_t, int64_t);
template void Group::begin(const FlatParams&, int64_t, int64_t);
template void Group::begin(const PagedIndexParams&, int64_t, int64_t);
template void Group::scan_tile(const Keys&, int64_t, int64_t, const Spans&, Segment);
template void Group::scan_tile(const PagedKeys&, int64_t, int64_t, const Spans&, Segment);
template void Group::scan(const Keys&, const Spans&);
template void Group::scan(const PagedKeys&, const Spans&);

}  // namespace hisa::cpu
