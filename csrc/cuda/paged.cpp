#include "paged.h"

#include <algorithm>
#include <bit>

#include "../carver.h"

namespace hisa::cuda {

namespace {

using Pieces = Carver<256>;  // as the allocator and the copy engine like it

PagedPart lay_out(const PagedIndexParams& call, bool direct, int64_t first, int64_t count,
                  Pieces& pieces) {
  PagedPart part{};
  part.direct = direct;
  part.call = call;
  part.first = first;
  part.count = count;
  part.kept = std::min(call.block_topk, part.slots());
  const int64_t key = call.keys.dim * element_size(call.keys.type);
  const int64_t tokens = part.rows() * part.kept * call.block_size;
  if (direct || part.prunes()) {
    part.pooled = pieces.take<char>(count * part.slots() * key);
    part.pooled_scale = pieces.take<float>(count * part.slots());
  }
  if (direct) {
    part.row_start = pieces.take<int32_t>(part.rows());
    part.row_end = pieces.take<int32_t>(part.rows());
    part.edges = pieces.take<int32_t>(count + 1);
    return part;
  }
  if (part.prunes()) part.chosen = pieces.take<int32_t>(part.rows() * (part.kept - 2));
  part.keys = pieces.take<char>(tokens * key);
  part.scale = call.keys.scale == nullptr ? nullptr : pieces.take<float>(tokens);
  part.lengths = pieces.take<int32_t>(count);
  part.blocks = pieces.take<int32_t>(part.rows() * part.kept);
  for (int32_t** piece : {&part.block_start, &part.block_end, &part.token_start, &part.token_end})
    *piece = pieces.take<int32_t>(part.rows());
  return part;
}

Queries rows_of(const PagedPart& part) {
  Queries queries = part.call.queries;
  const int64_t skipped = part.first_row() * queries.row_stride;
  queries.data =
      static_cast<const char*>(queries.data) + skipped * element_size(part.call.keys.type);
  queries.weights += part.first_row() * queries.weights_stride;
  queries.rows = part.rows();
  return queries;
}

Output output_of(const PagedPart& part) {
  const Output& all = part.call.output;
  const int64_t skipped = part.first_row() * all.topk;
  return {all.indices + skipped, all.scores == nullptr ? nullptr : all.scores + skipped, all.topk};
}

Keys gathered(const PagedPart& part, const char* data, const float* scale, int64_t count) {
  const int64_t dim = part.call.keys.dim;
  return {data, scale, count, dim, dim, part.call.keys.type};
}

}  // namespace

PagedSizes size_paged(const PagedIndexParams& call, bool direct) {
  const auto bytes = [&](int64_t count) {
    Pieces pieces(nullptr);
    lay_out(call, direct, 0, count, pieces);
    return pieces.used();
  };
  const int64_t one = std::max<int64_t>(1, bytes(1));
  // Numbers of tokens are int32.
  const int64_t most = std::max<int64_t>(1, INT32_MAX / std::max<int64_t>(1, call.keys.room));
  const int64_t sequences = std::clamp<int64_t>(
      direct ? std::min(kGathered / one, most) : kGathered / one, 1, call.keys.table.sequences);
  return {sequences, bytes(sequences)};
}

PagedPart make_part(const PagedIndexParams& call, bool direct, int64_t first, char* workspace) {
  Pieces pieces(reinterpret_cast<std::byte*>(workspace));
  const int64_t left = call.keys.table.sequences - first;
  return lay_out(call, direct, first, std::min(size_paged(call, direct).sequences, left), pieces);
}

RowsParams direct_rows(const PagedPart& part) {
  const PagedKeys& keys = part.call.keys;
  RowsParams params{};
  params.queries = rows_of(part);
  params.keys = {
      keys.data, static_cast<const float*>(keys.scale), part.count * keys.room, keys.dim, keys.dim,
      keys.type};
  params.pooled = gathered(part, part.pooled, part.pooled_scale, part.count * part.slots());
  params.windows = {part.row_start, part.row_end, part.edges, part.count};
  params.output = output_of(part);
  params.block_topk = part.call.block_topk;
  params.block_shift = std::countr_zero(static_cast<uint64_t>(part.call.block_size));
  return params;
}

PagedKeys keys_of(const PagedPart& part) {
  PagedKeys keys = part.call.keys;
  keys.table.ids += part.first * keys.table.stride;
  keys.table.lengths += part.first;
  keys.table.sequences = part.count;
  return keys;
}

RowsParams choose_blocks(const PagedPart& part) {
  RowsParams params{};
  params.queries = rows_of(part);
  params.keys = gathered(part, part.pooled, part.pooled_scale, part.count * part.slots());
  params.windows = {part.block_start, part.block_end, nullptr, 0};
  params.output = {part.chosen, nullptr, part.kept - 2};
  return params;
}

RowsParams choose_tokens(const PagedPart& part) {
  RowsParams params{};
  params.queries = rows_of(part);
  params.keys =
      gathered(part, part.keys, part.scale, part.rows() * part.kept * part.call.block_size);
  params.windows = {part.token_start, part.token_end, nullptr, 0};
  params.output = output_of(part);
  return params;
}

}  // namespace hisa::cuda
