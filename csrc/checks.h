// Every check of an argument, once, for every device. Each failure names the argument, what was
// expected and what came: TypeError for a dtype, ValueError for all else.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>

#include "params.h"

namespace hisa {

struct PoolArguments {
  const at::Tensor& k;
  const std::optional<at::Tensor>& k_scale;
  const std::optional<at::Tensor>& cu_seqlens_k;
  int64_t block_size;
  std::string_view pooling;
};

struct IndexArguments {
  const at::Tensor& q;
  const at::Tensor& k;
  const at::Tensor& weights;
  const std::optional<at::Tensor>& k_scale;
  const std::optional<at::Tensor>& ks;
  const std::optional<at::Tensor>& ke;
  const std::optional<at::Tensor>& cu_seqlens_k;
  const std::optional<at::Tensor>& pooled_k;
  const std::optional<at::Tensor>& pooled_scale;
  int64_t block_size;
  int64_t block_topk;
  int64_t topk;
  std::string_view pooling;
};

struct FlatArguments {
  const at::Tensor& q;
  const at::Tensor& k;
  const at::Tensor& weights;
  const std::optional<at::Tensor>& k_scale;
  const std::optional<at::Tensor>& ks;
  const std::optional<at::Tensor>& ke;
  int64_t topk;
};

struct MaskArguments {
  const at::Tensor& mask;
};

struct RopeArguments {
  const at::Tensor& x;
  const std::optional<at::Tensor>& cos;
  const std::optional<at::Tensor>& sin;
  int64_t first;
  bool interleaved;
  bool quantize;
  bool power_of_two;
};

struct FoldArguments {
  const at::Tensor& weights;
  const std::optional<at::Tensor>& scale;
};

struct CompleteArguments {
  const at::Tensor& indices;
  const at::Tensor& ks;
  const at::Tensor& ke;
  int64_t keys;
};

struct PagedPoolArguments {
  const at::Tensor& pages;
  const at::Tensor& pooled_k;
  const at::Tensor& pooled_scale;
  const at::Tensor& block_table;
  const at::Tensor& seq_lens;
  std::optional<int64_t> new_tokens;
  int64_t block_size;
  std::string_view pooling;
};

struct PagedIndexArguments {
  const at::Tensor& q;
  const at::Tensor& pages;
  const at::Tensor& weights;
  const at::Tensor& block_table;
  const at::Tensor& seq_lens;
  const at::Tensor& pooled_k;
  const at::Tensor& pooled_scale;
  int64_t next_n;
  int64_t block_size;
  int64_t block_topk;
  int64_t topk;
  bool physical;
};

void check(const PoolArguments& arguments);
void check(const IndexArguments& arguments);
void check(const FlatArguments& arguments);
void check(const MaskArguments& arguments);
void check(const RopeArguments& arguments);
void check(const FoldArguments& arguments);
void check(const CompleteArguments& arguments);
void check(const PagedPoolArguments& arguments);
void check(const PagedIndexArguments& arguments);

// Of tensors that results are written to: each is as the operator would return it, contiguous, and
// has memory that no other argument has. Scores and scales are optional.
void check_output(const PoolArguments& arguments, const at::Tensor& pooled_k,
                  const at::Tensor& pooled_scale);
void check_output(const IndexArguments& arguments, const at::Tensor& indices,
                  const std::optional<at::Tensor>& scores);
void check_output(const FlatArguments& arguments, const at::Tensor& indices,
                  const std::optional<at::Tensor>& scores);
void check_output(const PagedIndexArguments& arguments, const at::Tensor& indices,
                  const std::optional<at::Tensor>& scores);
void check_output(const MaskArguments& arguments, const at::Tensor& ks, const at::Tensor& ke,
                  const at::Tensor& summary);
void check_output(const RopeArguments& arguments, const at::Tensor& y,
                  const std::optional<at::Tensor>& scale);

// Sizes alone, for the planner.
void check_sizes(int64_t heads, int64_t dim, int64_t keys);
void check_dim(const char* name, int64_t dim);
void check_topk(int64_t topk);
void check_block_size(int64_t block_size);
void check_block_sizes(int64_t block_size, int64_t block_topk, int64_t topk);

ElementType element_type(at::ScalarType dtype);  // of a checked tensor
at::ScalarType page_type(const at::Tensor& pages);             // of the keys that they hold
int64_t page_size(const at::Tensor& pages, int64_t dim);       // of checked pages, in tokens
MaskType mask_type(const at::Tensor& mask);      // TypeError if it cannot be one
Pooling parse_pooling(std::string_view name);    // ValueError if unknown

}  // namespace hisa
