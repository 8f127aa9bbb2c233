// The operators, once for every device: check, guard, sizes, allocate, fill params, run. Each is
// there twice: `op` allocates its results, `op_out` gets them; `op_into` is what both do then.
//
// `Device` is where they run. It is made from k, which sets the current device, and provides
//   kAlignment, kFarthest            of rows and their distances, in bytes
//   overlaps(shape)                  whether rows of such a call may lie on top of each other
//   pool(params), index(params, shape), flat(params, shape)
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <tuple>

#include "checks.h"
#include "plan.h"

namespace hisa {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using TwoTensors = std::tuple<Tensor, Tensor>;

// Rows may lie apart or on top of each other; their elements must be adjacent, every row must begin
// at a multiple of `alignment` bytes and of an element's size, and from one to the next it must be
// `nearest` to `farthest` bytes.
inline Tensor adjacent(const Tensor& tensor, int64_t alignment = 1, int64_t nearest = 0,
                       int64_t farthest = std::numeric_limits<int64_t>::max()) {
  const int64_t step = std::max<int64_t>(alignment, tensor.element_size());
  bool suits =
      tensor.stride(-1) == 1 && reinterpret_cast<intptr_t>(tensor.const_data_ptr()) % step == 0;
  for (int64_t d = 0; d + 1 < tensor.dim(); ++d) {
    const int64_t distance = tensor.stride(d) * tensor.element_size();
    suits = suits && distance % step == 0 && distance <= farthest &&
            (distance >= nearest || tensor.size(d) == 1);
  }
  return suits ? tensor : tensor.clone(at::MemoryFormat::Contiguous);
}

inline OptionalTensor adjacent(const OptionalTensor& tensor, int64_t alignment = 1) {
  return tensor.has_value() ? OptionalTensor(adjacent(*tensor, alignment)) : std::nullopt;
}

// Queries or keys, as the device takes them.
template <class Device>
Tensor rows_for(const Tensor& tensor, bool overlap) {
  const int64_t row = tensor.size(-1) * tensor.element_size();
  return adjacent(tensor, Device::kAlignment, overlap ? 0 : row, Device::kFarthest);
}

template <class T>
const T* data_or_null(const OptionalTensor& tensor) {
  return tensor.has_value() ? tensor->const_data_ptr<T>() : nullptr;
}

inline Keys make_keys(const Tensor& k, const OptionalTensor& scale) {
  return {.data = k.const_data_ptr(),
          .scale = data_or_null<float>(scale),
          .count = k.size(0),
          .stride = k.stride(0),
          .dim = k.size(1),
          .type = element_type(k.scalar_type())};
}

inline Queries make_queries(const Tensor& q, const Tensor& weights) {
  return {.data = q.const_data_ptr(),
          .weights = weights.const_data_ptr<float>(),
          .rows = q.size(0),
          .heads = q.size(1),
          .row_stride = q.stride(0),
          .head_stride = q.stride(1),
          .weights_stride = weights.stride(0)};
}

inline Windows make_windows(const OptionalTensor& ks, const OptionalTensor& ke,
                            const OptionalTensor& cu_seqlens) {
  return {.start = data_or_null<int32_t>(ks),
          .end = data_or_null<int32_t>(ke),
          .cu_seqlens = data_or_null<int32_t>(cu_seqlens),
          .segments = cu_seqlens.has_value() ? cu_seqlens->numel() - 1 : 0};
}

// Indices, and scores that have no rows unless they are wanted.
inline TwoTensors make_output(const Tensor& q, int64_t topk, bool return_scores) {
  return {at::empty({q.size(0), topk}, q.options().dtype(at::kInt)),
          at::empty({return_scores ? q.size(0) : 0, topk}, q.options().dtype(at::kFloat))};
}

inline Output output_params(const Tensor& indices, const OptionalTensor& scores) {
  return {.indices = indices.mutable_data_ptr<int32_t>(),
          .scores = scores.has_value() ? scores->mutable_data_ptr<float>() : nullptr,
          .topk = indices.size(1)};
}

// A result that was allocated in any case, if it is wanted.
inline OptionalTensor only_if(bool wanted, const Tensor& result) {
  return wanted ? OptionalTensor(result) : std::nullopt;
}

// Autograd notices by its version that a tensor has been written.
inline void bump_version(const OptionalTensor& written) {
  if (written.has_value() && !written->is_inference())
    written->unsafeGetTensorImpl()->bump_version();
}

// An operator that is given its results.
template <class Arguments, class Into, class... Results>
void write(const Arguments& arguments, Into into, const Results&... results) {
  check(arguments);
  check_output(arguments, results...);
  const at::AutoDispatchBelowADInplaceOrView guard;
  into(arguments, results...);
  (bump_version(results), ...);
}

inline TwoTensors make_pooled(const Tensor& k, int64_t block_size) {
  const int64_t slots = (k.size(0) + block_size - 1) / block_size;
  return {at::empty({slots, k.size(1)}, k.options()),
          at::empty({slots}, k.options().dtype(at::kFloat))};
}

// Pool keys that have been made adjacent.
template <class Device>
void pool_adjacent(Device& device, const Tensor& k, const OptionalTensor& k_scale,
                   const OptionalTensor& cu_seqlens, int64_t block_size, Pooling pooling,
                   const Tensor& pooled_k, const Tensor& pooled_scale) {
  device.pool({.keys = make_keys(k, k_scale),
               .windows = make_windows({}, {}, cu_seqlens),
               .pooled = pooled_k.mutable_data_ptr(),
               .pooled_scale = pooled_scale.mutable_data_ptr<float>(),
               .slots = pooled_k.size(0),
               .block_size = block_size,
               .pooling = pooling});
}

template <class Device>
void pool_into(const PoolArguments& a, const Tensor& pooled_k, const Tensor& pooled_scale) {
  Device device(a.k);
  pool_adjacent(device, rows_for<Device>(a.k, true), adjacent(a.k_scale, Device::kAlignment),
                adjacent(a.cu_seqlens_k), a.block_size, parse_pooling(a.pooling), pooled_k,
                pooled_scale);
}

template <class Device>
TwoTensors pool_keys(const Tensor& k, const OptionalTensor& k_scale,
                     const OptionalTensor& cu_seqlens_k, int64_t block_size,
                     std::string_view pooling) {
  const PoolArguments arguments{k, k_scale, cu_seqlens_k, block_size, pooling};
  check(arguments);
  const at::AutoDispatchBelowADInplaceOrView guard;
  const auto [pooled_k, pooled_scale] = make_pooled(k, block_size);
  pool_into<Device>(arguments, pooled_k, pooled_scale);
  return {pooled_k, pooled_scale};
}

template <class Device>
void pool_keys_out(const Tensor& k, const OptionalTensor& k_scale,
                   const OptionalTensor& cu_seqlens_k, int64_t block_size, std::string_view pooling,
                   const Tensor& pooled_k, const Tensor& pooled_scale) {
  write(PoolArguments{k, k_scale, cu_seqlens_k, block_size, pooling}, pool_into<Device>, pooled_k,
        pooled_scale);
}

template <class Device>
void index_into(const IndexArguments& a, const Tensor& indices, const OptionalTensor& scores) {
  Device device(a.k);
  const Shape shape{.rows = a.q.size(0),
                    .keys = a.k.size(0),
                    .heads = a.q.size(1),
                    .dim = a.q.size(2),
                    .type = element_type(a.k.scalar_type()),
                    .topk = a.topk,
                    .block_size = a.block_size,
                    .block_topk = a.block_topk,
                    .pooled = a.pooled_k.has_value()};
  const bool overlap = device.overlaps(shape);
  const Tensor queries = rows_for<Device>(a.q, overlap);
  const Tensor keys = rows_for<Device>(a.k, overlap);
  const Tensor head_weights = adjacent(a.weights);
  const OptionalTensor scale = adjacent(a.k_scale, Device::kAlignment);
  const OptionalTensor segments = adjacent(a.cu_seqlens_k);
  const OptionalTensor start = adjacent(a.ks);
  const OptionalTensor end = adjacent(a.ke);
  std::optional<TwoTensors> pooled;  // not where every block is kept
  if (shape.pooled) {
    pooled.emplace(rows_for<Device>(*a.pooled_k, overlap),
                   adjacent(*a.pooled_scale, Device::kAlignment));
  } else if (shape.pools()) {
    pooled = make_pooled(keys, a.block_size);
    pool_adjacent(device, keys, scale, segments, a.block_size, parse_pooling(a.pooling),
                  std::get<0>(*pooled), std::get<1>(*pooled));
  }

  device.index({.queries = make_queries(queries, head_weights),
                .keys = make_keys(keys, scale),
                .pooled = pooled ? make_keys(std::get<0>(*pooled), std::get<1>(*pooled)) : Keys{},
                .windows = make_windows(start, end, segments),
                .output = output_params(indices, scores),
                .block_size = a.block_size,
                .block_topk = a.block_topk},
               shape);
}

template <class Device>
TwoTensors index(const Tensor& q, const Tensor& k, const Tensor& weights,
                 const OptionalTensor& k_scale, const OptionalTensor& ks, const OptionalTensor& ke,
                 const OptionalTensor& cu_seqlens_k, const OptionalTensor& pooled_k,
                 const OptionalTensor& pooled_scale, int64_t block_size, int64_t block_topk,
                 int64_t topk, std::string_view pooling, bool return_scores) {
  const IndexArguments arguments{
      q,          k,          weights, k_scale, ks, ke, cu_seqlens_k, pooled_k, pooled_scale,
      block_size, block_topk, topk,    pooling};
  check(arguments);
  const at::AutoDispatchBelowADInplaceOrView guard;
  const auto [indices, scores] = make_output(q, topk, return_scores);
  index_into<Device>(arguments, indices, only_if(return_scores, scores));
  return {indices, scores};
}

template <class Device>
void index_out(const Tensor& q, const Tensor& k, const Tensor& weights,
               const OptionalTensor& k_scale, const OptionalTensor& ks, const OptionalTensor& ke,
               const OptionalTensor& cu_seqlens_k, const OptionalTensor& pooled_k,
               const OptionalTensor& pooled_scale, int64_t block_size, int64_t block_topk,
               int64_t topk, std::string_view pooling, const Tensor& indices,
               const OptionalTensor& scores) {
  write(IndexArguments{q, k, weights, k_scale, ks, ke, cu_seqlens_k, pooled_k, pooled_scale,
                       block_size, block_topk, topk, pooling},
        index_into<Device>, indices, scores);
}

template <class Device>
void flat_into(const FlatArguments& a, const Tensor& indices, const OptionalTensor& scores) {
  Device device(a.k);
  const Shape shape{.rows = a.q.size(0),
                    .keys = a.k.size(0),
                    .heads = a.q.size(1),
                    .dim = a.q.size(2),
                    .type = element_type(a.k.scalar_type()),
                    .topk = a.topk,
                    .block_size = 0,
                    .block_topk = 0,
                    .pooled = false};
  const bool overlap = device.overlaps(shape);
  const Tensor queries = rows_for<Device>(a.q, overlap);
  const Tensor keys = rows_for<Device>(a.k, overlap);
  const Tensor head_weights = adjacent(a.weights);
  const OptionalTensor scale = adjacent(a.k_scale, Device::kAlignment);
  const OptionalTensor start = adjacent(a.ks);
  const OptionalTensor end = adjacent(a.ke);

  device.flat({.queries = make_queries(queries, head_weights),
               .keys = make_keys(keys, scale),
               .windows = make_windows(start, end, {}),
               .output = output_params(indices, scores)},
              shape);
}

template <class Device>
TwoTensors flat_index(const Tensor& q, const Tensor& k, const Tensor& weights,
                      const OptionalTensor& k_scale, const OptionalTensor& ks,
                      const OptionalTensor& ke, int64_t topk, bool return_scores) {
  const FlatArguments arguments{q, k, weights, k_scale, ks, ke, topk};
  check(arguments);
  const at::AutoDispatchBelowADInplaceOrView guard;
  const auto [indices, scores] = make_output(q, topk, return_scores);
  flat_into<Device>(arguments, indices, only_if(return_scores, scores));
  return {indices, scores};
}

template <class Device>
void flat_index_out(const Tensor& q, const Tensor& k, const Tensor& weights,
                    const OptionalTensor& k_scale, const OptionalTensor& ks,
                    const OptionalTensor& ke, int64_t topk, const Tensor& indices,
                    const OptionalTensor& scores) {
  write(FlatArguments{q, k, weights, k_scale, ks, ke, topk}, flat_into<Device>, indices, scores);
}

}  // namespace hisa
