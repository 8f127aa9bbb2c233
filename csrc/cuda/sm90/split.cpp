#include "split.h"

#include <algorithm>
#include <bit>
#include <limits>
#include <numeric>

#include "../../support.h"
#include "../choice.h"

namespace hisa::cuda::sm90 {
namespace {

constexpr int64_t kBlocks = 2;  // of a multiprocessor, at most

constexpr int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

int log2_of(int64_t power) { return std::countr_zero(static_cast<uint64_t>(power)); }

// That a row has at once, in whole tiles.
struct Scores {
  int64_t kept;  // blocks
  int64_t slots, tokens;

  explicit Scores(const Shape& shape)
      : kept(std::min(shape.block_topk, shape.slots())),
        slots(shape.slots() > shape.block_topk ? round_up(shape.slots(), kSplitTile) : 0),
        tokens(round_up(kept * shape.block_size, kSplitTile)) {}
};

SplitLayout lay_out(const Shape& shape, const Scores& scores, bool alone) {
  constexpr int64_t kTiles = kSplitScorers * kSplitStages;
  const int64_t row = shape.dim * element_size(shape.type);
  const int64_t chosen = std::max(std::min(shape.topk, scores.tokens), scores.kept);
  SplitLayout at{};
  at.keys = shape.heads * row;
  // Where keys were, there is a histogram later, then what is selected.
  at.scale = at.keys + std::max(kTiles * kSplitTile * row,
                                round_up(std::max(chosen, kSplitBins + kMostRanked), 4) * 4);
  at.slots = at.scale + kTiles * kSplitTile * 4;
  // NOTE: a peer may send scores of tokens while this block still chooses among blocks.
  at.tokens = alone ? at.slots : at.slots + scores.slots * 4;
  at.blocks = at.tokens + std::max(scores.tokens, alone ? scores.slots : 0) * 4;
  at.shared = at.blocks + round_up(scores.kept, 4) * 4;
  at.total = at.shared + static_cast<int64_t>(sizeof(SplitShared));
  return at;
}

// All but where the keys are.
SplitParams fill(const Queries& queries, const Output& output, int64_t block_topk) {
  SplitParams params{};
  params.queries = queries;
  params.output = output;
  params.block_topk = static_cast<uint32_t>(std::min(block_topk, support::kMaxKeys));
  params.next_n = 1;
  return params;
}

Storage adjacent(const Keys& keys) {
  return {.data = static_cast<const char*>(keys.data),
          .scale = keys.scale,
          .unit = static_cast<uint32_t>(keys.stride * element_size(keys.type)),
          .page_stride = 0,
          .stride = 1,
          .scale_page_stride = 0,
          .page_shift = 31};
}

int64_t row_bytes(const PagedKeys& keys) { return keys.dim * element_size(keys.type); }

Storage in_pages(const PagedKeys& keys) {
  const int64_t unit = std::gcd(keys.stride, row_bytes(keys));
  return {.data = static_cast<const char*>(keys.data),
          .scale = static_cast<const float*>(keys.scale),
          .unit = static_cast<uint32_t>(unit),
          .page_stride = static_cast<uint32_t>(keys.stride / unit),
          .stride = static_cast<uint32_t>(row_bytes(keys) / unit),
          .scale_page_stride = static_cast<uint32_t>(keys.scale_stride),
          .page_shift = log2_of(keys.page_size)};
}

bool reaches(const PagedKeys& keys) {
  const int64_t unit = std::gcd(keys.stride, row_bytes(keys));
  const int64_t most = std::numeric_limits<uint32_t>::max();
  return keys.scale_stride <= most && keys.stride / unit <= most / keys.table.pages;
}

cudaError_t launch_split(const SplitParams& params, const SplitPlan& plan, ElementType type,
                         int64_t dim, cudaStream_t stream) {
  return type == ElementType::kFloat8E4M3
             ? launch_split_of<ElementType::kFloat8E4M3>(params, plan, dim, stream)
             : launch_split_of<ElementType::kBFloat16>(params, plan, dim, stream);
}

}  // namespace

SplitPlan plan_split(const Shape& shape, const DeviceLimits& limits) {
  SplitPlan plan{};
  plan.shared_limit = limits.shared_block;
  plan.device = limits.device;
  const Scores scores(shape);
  plan.tiles = std::max(scores.slots, scores.tokens) / kSplitTile;
  plan.alone = lay_out(shape, scores, true);
  plan.together = lay_out(shape, scores, false);
  // More than half of a multiprocessor's: peers share it with nobody.
  plan.together.total = std::max(plan.together.total, limits.shared_total / 2 + 1);
  plan.splits = use_split && !shape.flat() && plan.tiles * kSplitTile <= kMostScores &&
                shape.rows <= kBlocks * limits.multiprocessors &&
                std::max(plan.alone.total, plan.together.total) <= limits.shared_block;
  return plan;
}

bool can_split(const PagedIndexParams& call) { return reaches(call.keys) && reaches(call.pooled); }

cudaError_t launch_split(const RowsParams& rows, const SplitPlan& plan, cudaStream_t stream) {
  SplitParams params = fill(rows.queries, rows.output, rows.block_topk);
  params.block_shift = rows.block_shift;
  params.keys = adjacent(rows.keys);
  params.pooled = adjacent(rows.pooled);
  params.windows = rows.windows;
  params.count = rows.keys.count;
  return launch_split(params, plan, rows.keys.type, rows.keys.dim, stream);
}

cudaError_t launch_split(const PagedIndexParams& call, const SplitPlan& plan, cudaStream_t stream) {
  SplitParams params = fill(call.queries, call.output, call.block_topk);
  params.block_shift = log2_of(call.block_size);
  params.keys = in_pages(call.keys);
  params.pooled = in_pages(call.pooled);
  params.table = call.keys.table;
  params.next_n = static_cast<uint32_t>(call.windows.next_n);
  params.page_shift = log2_of(call.keys.page_size);
  params.physical = call.physical;
  return launch_split(params, plan, call.keys.type, call.keys.dim, stream);
}

}  // namespace hisa::cuda::sm90
