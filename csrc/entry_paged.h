// The operators on paged caches, once for every device. `Device` is as in entry.h and provides
//   paged_pool(params), paged_index(params, shape)
//
// Pages and pooled keys are never copied: the checks insist that they lie as the kernels read them.
#pragma once

#include "entry.h"
#include "pages.h"

namespace hisa {

// The keys of the tokens, in blocks of `block_size`.
inline PagedKeys make_paged_keys(const Tensor& pages, const PageTable& table, int64_t dim,
                                 int64_t block_size) {
  const ElementType type = element_type(page_type(pages));
  const int64_t tokens = page_size(pages, dim);
  const auto* data = static_cast<const char*>(pages.const_data_ptr());
  const int64_t stride = pages.stride(0) * pages.element_size();
  const int64_t room = (table.width * tokens + block_size - 1) / block_size * block_size;
  return {.data = data,
          .scale = type == ElementType::kFloat8E4M3 ? data + tokens * dim : nullptr,
          .stride = stride,
          .scale_stride = stride,
          .page_size = tokens,
          .entries = 1,
          .room = room,
          .count = table.sequences * room,
          .dim = dim,
          .type = type,
          .table = table};
}

// The pooled keys of blocks of these keys.
inline PagedKeys make_paged_pooled(const Tensor& pooled_k, const Tensor& pooled_scale,
                                   const PagedKeys& keys, int64_t block_size) {
  return {.data = pooled_k.const_data_ptr(),
          .scale = pooled_scale.const_data_ptr(),
          .stride = pooled_k.stride(0) * pooled_k.element_size(),
          .scale_stride = pooled_scale.stride(0) * pooled_scale.element_size(),
          .page_size = 1,
          .entries = block_size / keys.page_size,
          .room = keys.room / block_size,
          .count = keys.count / block_size,
          .dim = keys.dim,
          .type = keys.type,
          .table = keys.table};
}

inline PageTable make_table(const Tensor& block_table, const Tensor& seq_lens, int64_t pages) {
  return {.ids = block_table.const_data_ptr<int32_t>(),
          .lengths = seq_lens.const_data_ptr<int32_t>(),
          .sequences = block_table.size(0),
          .width = block_table.size(1),
          .stride = block_table.stride(0),
          .pages = pages};
}

template <class Device>
void paged_pool(const Tensor& pages, const Tensor& pooled_k, const Tensor& pooled_scale,
                const Tensor& block_table, const Tensor& seq_lens,
                std::optional<int64_t> new_tokens, int64_t block_size, std::string_view pooling) {
  check(PagedPoolArguments{pages, pooled_k, pooled_scale, block_table, seq_lens, new_tokens,
                           block_size, pooling});
  const at::AutoDispatchBelowADInplaceOrView guard;
  Device device(pages);

  const Tensor ids = adjacent(block_table);
  const Tensor lengths = adjacent(seq_lens);
  const PageTable table = make_table(ids, lengths, pages.size(0));
  const PagedKeys keys = make_paged_keys(pages, table, pooled_k.size(1), block_size);
  device.paged_pool({.keys = keys,
                     .pooled = pooled_k.mutable_data_ptr(),
                     .pooled_scale = pooled_scale.mutable_data_ptr<float>(),
                     .pooled_stride = pooled_k.stride(0) * pooled_k.element_size(),
                     .scale_stride = pooled_scale.stride(0),
                     .block_size = block_size,
                     .new_tokens = new_tokens.value_or(keys.room),
                     .pooling = parse_pooling(pooling)});
  bump_version(pooled_k);
  bump_version(pooled_scale);
}

template <class Device>
void paged_index_into(const PagedIndexArguments& a, const Tensor& indices,
                      const OptionalTensor& scores) {
  Device device(a.pages);
  const Tensor ids = adjacent(a.block_table);
  const Tensor lengths = adjacent(a.seq_lens);
  const PageTable table = make_table(ids, lengths, a.pages.size(0));
  const PagedKeys keys = make_paged_keys(a.pages, table, a.q.size(2), a.block_size);
  const Shape shape{.rows = a.q.size(0),
                    .keys = table.width * keys.page_size,
                    .heads = a.q.size(1),
                    .dim = a.q.size(2),
                    .type = keys.type,
                    .topk = a.topk,
                    .block_size = a.block_size,
                    .block_topk = a.block_topk,
                    .pooled = true};
  const Tensor queries = rows_for<Device>(a.q, device.overlaps(shape));
  const Tensor head_weights = adjacent(a.weights);
  if (shape.rows == 0 || keys.room == 0 || table.pages == 0) {  // no sequence has a token
    indices.fill_(-1);
    if (scores.has_value()) scores->fill_(-std::numeric_limits<float>::infinity());
    return;
  }
  device.paged_index({.queries = make_queries(queries, head_weights),
                      .keys = keys,
                      .pooled = make_paged_pooled(a.pooled_k, a.pooled_scale, keys, a.block_size),
                      .windows = {.next_n = a.next_n},
                      .output = output_params(indices, scores),
                      .block_size = a.block_size,
                      .block_topk = a.block_topk,
                      .physical = a.physical},
                     shape);
}

template <class Device>
TwoTensors paged_index(const Tensor& q, const Tensor& pages, const Tensor& weights,
                       const Tensor& block_table, const Tensor& seq_lens, const Tensor& pooled_k,
                       const Tensor& pooled_scale, int64_t next_n, int64_t block_size,
                       int64_t block_topk, int64_t topk, bool physical, bool return_scores) {
  const PagedIndexArguments arguments{q,          pages,      weights,      block_table,
                                      seq_lens,   pooled_k,   pooled_scale, next_n,
                                      block_size, block_topk, topk,         physical};
  check(arguments);
  const at::AutoDispatchBelowADInplaceOrView guard;
  const auto [indices, scores] = make_output(q, topk, return_scores);
  paged_index_into<Device>(arguments, indices, only_if(return_scores, scores));
  return {indices, scores};
}

template <class Device>
void paged_index_out(const Tensor& q, const Tensor& pages, const Tensor& weights,
                     const Tensor& block_table, const Tensor& seq_lens, const Tensor& pooled_k,
                     const Tensor& pooled_scale, int64_t next_n, int64_t block_size,
                     int64_t block_topk, int64_t topk, bool physical, const Tensor& indices,
                     const OptionalTensor& scores) {
  write(PagedIndexArguments{q, pages, weights, block_table, seq_lens, pooled_k, pooled_scale,
                            next_n, block_size, block_topk, topk, physical},
        paged_index_into<Device>, indices, scores);
}

}  // namespace hisa
