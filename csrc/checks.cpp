#include "checks.h"

#include <algorithm>

#include "expected.h"
#include "support.h"
#include "text.h"

namespace hisa {
namespace {

using at::ScalarType;
using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

bool is_element_type(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half ||
         dtype == ScalarType::Float8_e4m3fn;
}

void check_keys(const Tensor& k, const OptionalTensor& k_scale) {
  TORCH_CHECK_TYPE(is_element_type(k.scalar_type()),
                   join("k: expected [N, D] ", support::kElementTypes, ", got ", describe(k)));
  TORCH_CHECK_VALUE(k.dim() == 2, join("k: expected [N, D], got ", describe(k)));
  check_sizes(1, k.size(1), k.size(0));
  Expected{"k_scale", "[N]", ScalarType::Float, {k.size(0)}}.check(k_scale, k);
}

void check_queries(const Tensor& q, const Tensor& k, const Tensor& weights) {
  Expected{"q", "[M, H, D]", k.scalar_type(), {-1, -1, k.size(1)}}.check(q, k);
  check_sizes(q.size(1), k.size(1), k.size(0));
  Expected{"weights", "[M, H]", ScalarType::Float, {q.size(0), q.size(1)}}.check(weights, k);
}

void check_windows(const Tensor& q, const Tensor& k, const OptionalTensor& ks,
                   const OptionalTensor& ke) {
  Expected{"ks", "[M]", ScalarType::Int, {q.size(0)}}.check(ks, k);
  Expected{"ke", "[M]", ScalarType::Int, {q.size(0)}}.check(ke, k);
}

void check_segments(const OptionalTensor& cu_seqlens_k, const Tensor& k) {
  Expected{"cu_seqlens_k", "[S + 1]", ScalarType::Int, {-1}}.check(cu_seqlens_k, k);
  TORCH_CHECK_VALUE(!cu_seqlens_k.has_value() || cu_seqlens_k->numel() > 0,
                    "cu_seqlens_k: expected [S + 1] int32, got an empty tensor");
}

}  // namespace

void check_sizes(int64_t heads, int64_t dim, int64_t keys) {
  TORCH_CHECK_VALUE(heads >= 1 && heads <= support::kMaxHeads,
                    join("q: expected 1 to ", support::kMaxHeads, " heads (H), got ", heads));
  check_dim("k", dim);
  TORCH_CHECK_VALUE(keys >= 0 && keys <= support::kMaxKeys,
                    join("k: expected at most ", support::kMaxKeys, " keys (N), got ", keys));
}

void check_dim(const char* name, int64_t dim) {
  TORCH_CHECK_VALUE(
      dim >= support::kDimStep && dim <= support::kMaxDim && dim % support::kDimStep == 0,
      join(name, ": expected D to be a multiple of ", support::kDimStep, " from ",
           support::kDimStep, " to ", support::kMaxDim, ", got ", dim));
}

void check_block_size(int64_t block_size) {
  const auto& sizes = support::kBlockSizes;
  TORCH_CHECK_VALUE(std::find(sizes.begin(), sizes.end(), block_size) != sizes.end(),
                    join("block_size: expected one of ", list(sizes), ", got ", block_size));
}

void check_topk(int64_t topk) {
  TORCH_CHECK_VALUE(topk >= 1, join("topk: expected at least 1, got ", topk));
  TORCH_CHECK_VALUE(topk <= support::kMaxKeys,
                    join("topk: expected at most ", support::kMaxKeys, ", got ", topk));
}

void check_block_sizes(int64_t block_size, int64_t block_topk, int64_t topk) {
  check_block_size(block_size);
  TORCH_CHECK_VALUE(block_topk >= support::kMinBlockTopk,
                    join("block_topk: expected at least ", support::kMinBlockTopk,
                         " (the first and the last block are always kept), got ", block_topk));
  check_topk(topk);
  // Divided rather than multiplied: block_topk may be anything.
  TORCH_CHECK_VALUE((topk - 1) / block_size < block_topk,
                    join("topk: expected at most block_topk * block_size = ", block_topk, " * ",
                         block_size, ", got ", topk));
}

void check(const PoolArguments& a) {
  check_keys(a.k, a.k_scale);
  check_segments(a.cu_seqlens_k, a.k);
  check_block_size(a.block_size);
  parse_pooling(a.pooling);
}

void check(const IndexArguments& a) {
  check_keys(a.k, a.k_scale);
  check_queries(a.q, a.k, a.weights);
  check_windows(a.q, a.k, a.ks, a.ke);
  check_segments(a.cu_seqlens_k, a.k);
  check_block_sizes(a.block_size, a.block_topk, a.topk);
  parse_pooling(a.pooling);
  TORCH_CHECK_VALUE(a.pooled_k.has_value() == a.pooled_scale.has_value(),
                    join("pooled: expected both pooled_k and pooled_scale or neither, got only ",
                         a.pooled_k.has_value() ? "pooled_k" : "pooled_scale"));
  const int64_t slots = (a.k.size(0) + a.block_size - 1) / a.block_size;
  Expected{"pooled_k", "[ceil(N / block_size), D]", a.k.scalar_type(), {slots, a.k.size(1)}}.check(
      a.pooled_k, a.k);
  Expected{"pooled_scale", "[ceil(N / block_size)]", ScalarType::Float, {slots}}.check(
      a.pooled_scale, a.k);
}

void check(const FlatArguments& a) {
  check_keys(a.k, a.k_scale);
  check_queries(a.q, a.k, a.weights);
  check_windows(a.q, a.k, a.ks, a.ke);
  check_topk(a.topk);
}

void check(const MaskArguments& a) {
  mask_type(a.mask);
  TORCH_CHECK_VALUE(a.mask.dim() == 3, join("mask: expected [B, S, T], got ", describe(a.mask)));
  TORCH_CHECK_VALUE(
      a.mask.size(2) <= support::kMaxKeys,
      join("mask: expected at most ", support::kMaxKeys, " keys (T), got ", a.mask.size(2)));
}

void check(const RopeArguments& a) {
  const bool known =
      is_element_type(a.x.scalar_type()) && a.x.scalar_type() != ScalarType::Float8_e4m3fn;
  TORCH_CHECK_TYPE(
      known, join("x: expected [B, S, H, D] float32, bfloat16 or float16, got ", describe(a.x)));
  TORCH_CHECK_VALUE(a.x.dim() == 4, join("x: expected [B, S, H, D], got ", describe(a.x)));
  const int64_t dim = a.x.size(3);
  TORCH_CHECK_VALUE(
      dim >= support::kDimStep && dim <= support::kMaxDim && dim % support::kDimStep == 0,
      join("x: expected D to be a multiple of ", support::kDimStep, " from ", support::kDimStep,
           " to ", support::kMaxDim, ", got ", dim));
  TORCH_CHECK_VALUE(
      a.cos.has_value() == a.sin.has_value(),
      join("cos, sin: expected both or neither, got only ", a.cos.has_value() ? "cos" : "sin"));
  if (!a.cos.has_value()) {
    TORCH_CHECK_VALUE(a.quantize, "cos, sin: expected both, got neither, and nothing to quantize");
    return;
  }
  const auto check_angles = [&](const char* name, const Tensor& got) {
    const bool one = got.dim() == 3 && got.size(0) == 1;
    Expected{
        name, "[B or 1, S, R]", a.x.scalar_type(), {one ? 1 : a.x.size(0), a.x.size(1), -1}, "x"}
        .check(got, a.x);
  };
  check_angles("cos", *a.cos);
  Expected{"sin", "[B or 1, S, R]", a.x.scalar_type(), a.cos->sizes().vec(), "x"}.check(*a.sin,
                                                                                        a.x);
  const int64_t turned = a.cos->size(2);
  TORCH_CHECK_VALUE(turned > 0 && turned % support::kTurnedStep == 0,
                    join("cos: expected R to be a multiple of ", support::kTurnedStep, ", got ",
                         describe(*a.cos)));
  TORCH_CHECK_VALUE(a.first >= 0 && a.first % support::kTurnedStep == 0 && a.first <= dim - turned,
                    join("first: expected a multiple of ", support::kTurnedStep,
                         " from 0 to D - R = ", dim - turned, ", got ", a.first));
}

void check(const FoldArguments& a) {
  TORCH_CHECK_TYPE(a.weights.is_floating_point(),
                   join("weights: expected a floating-point tensor, got ", describe(a.weights)));
  Expected{"scale", "the shape of weights", ScalarType::Float, a.weights.sizes().vec(), "weights"}
      .check(a.scale, a.weights);
}

void check(const CompleteArguments& a) {
  Expected{"indices", "[M, topk]", ScalarType::Int, {-1, -1}}.check(a.indices, a.indices);
  TORCH_CHECK_VALUE(a.indices.is_contiguous(), "indices: expected a contiguous tensor");
  const int64_t rows = a.indices.size(0);
  TORCH_CHECK_VALUE(rows <= support::kMaxRows,
                    join("indices: expected at most ", support::kMaxRows, " rows (M), got ", rows));
  Expected{"ks", "[M]", ScalarType::Int, {rows}, "indices"}.check(a.ks, a.indices);
  Expected{"ke", "[M]", ScalarType::Int, {rows}, "indices"}.check(a.ke, a.indices);
  TORCH_CHECK_VALUE(a.keys >= a.indices.size(1) && a.keys <= support::kMaxKeys,
                    join("keys: expected topk = ", a.indices.size(1), " to ", support::kMaxKeys,
                         ", got ", a.keys));
}

ElementType element_type(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return ElementType::kFloat32;
    case ScalarType::BFloat16: return ElementType::kBFloat16;
    case ScalarType::Half: return ElementType::kFloat16;
    case ScalarType::Float8_e4m3fn: return ElementType::kFloat8E4M3;
    default:
      TORCH_CHECK_TYPE(
          false, join("dtype: expected ", support::kElementTypes, ", got ", dtype_name(dtype)));
  }
}

MaskType mask_type(const Tensor& mask) {
  switch (mask.scalar_type()) {
    case ScalarType::Bool: return MaskType::kBool;
    case ScalarType::Half: return MaskType::kFloat16;
    case ScalarType::BFloat16: return MaskType::kBFloat16;
    case ScalarType::Float: return MaskType::kFloat32;
    case ScalarType::Double: return MaskType::kFloat64;
    default:
      TORCH_CHECK_TYPE(
          false, join("mask: expected [B, S, T] ", support::kMaskTypes, ", got ", describe(mask)));
  }
}

Pooling parse_pooling(std::string_view name) {
  if (name == "mean") return Pooling::kMean;
  if (name == "max") return Pooling::kMax;
  TORCH_CHECK_VALUE(false, join("pooling: expected ", support::kPoolings, ", got \"", name, "\""));
}

}  // namespace hisa
