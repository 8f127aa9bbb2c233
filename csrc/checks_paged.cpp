// The checks of paged calls. What they print is as in checks.cpp.
#include <algorithm>
#include <utility>

#include "checks.h"
#include "expected.h"
#include "memory.h"
#include "support.h"
#include "text.h"

namespace hisa {
namespace {

using at::ScalarType;
using at::Tensor;

bool is_dense(const Tensor& tensor) {  // each entry
  int64_t expected = 1;
  for (int64_t d = tensor.dim() - 1; d > 0; expected *= tensor.size(d), --d)
    if (tensor.size(d) != 1 && tensor.stride(d) != expected) return false;
  return true;
}

// A cache is never copied, so it has to lie as the kernels read it.
void check_memory(const char* name, const Tensor& tensor, int64_t alignment) {
  const Entries entries(tensor);
  const bool apart =
      entries.count <= 1 || (entries.stride >= entries.size && entries.stride % alignment == 0);
  TORCH_CHECK_VALUE(is_dense(tensor) && apart && entries.begin % alignment == 0,
                    join(name, ": expected dense entries that begin at multiples of ", alignment,
                         " bytes and do not overlap, got strides ", list(tensor.strides()), " of ",
                         dtype_name(tensor.scalar_type()), " from an address that is ",
                         entries.begin % alignment, " modulo ", alignment));
}

void check_pages(const Tensor& pages, int64_t dim) {
  const bool bytes = pages.scalar_type() == ScalarType::Byte;
  const int64_t width = bytes ? dim + 4 : dim;
  const bool shaped = (bytes && pages.dim() == 2 && pages.size(1) % width == 0) ||
                      (pages.dim() == 3 && pages.size(2) == width) ||
                      (bytes && pages.dim() == 4 && pages.size(2) == 1 && pages.size(3) == width);
  const auto& sizes = support::kPageSizes;
  TORCH_CHECK_VALUE(
      shaped && std::find(sizes.begin(), sizes.end(), page_size(pages, dim)) != sizes.end(),
      join("pages: expected ",
           bytes ? "[P, page_size * (D + 4)], [P, page_size, D + 4] or [P, page_size, 1, D + 4]"
                 : "[P, page_size, D]",
           " with D = ", dim, " and page_size one of ", list(sizes), ", got ", describe(pages)));
  TORCH_CHECK_VALUE(
      pages.size(0) <= support::kMaxKeys,
      join("pages: expected at most ", support::kMaxKeys, " pages (P), got ", pages.size(0)));
  check_memory("pages", pages, support::kPageAlignment);
}

void check_table(const Tensor& block_table, const Tensor& seq_lens, const Tensor& pages,
                 int64_t tokens) {
  Expected{"block_table", "[batch, W]", ScalarType::Int, {-1, -1}, "pages"}.check(block_table,
                                                                                  pages);
  const int64_t batch = block_table.size(0);
  Expected{"seq_lens", "[batch]", ScalarType::Int, {batch}, "pages"}.check(seq_lens, pages);
  TORCH_CHECK_VALUE(batch <= support::kMaxRows, join("block_table: expected at most ",
                                                     support::kMaxRows, " sequences, got ", batch));
  TORCH_CHECK_VALUE(block_table.size(1) <= support::kMaxKeys / tokens,
                    join("block_table: expected at most ", support::kMaxKeys,
                         " tokens in a sequence, got ", block_table.size(1), " pages of ", tokens));
}

void check_pooled(const Tensor& pooled_k, const Tensor& pooled_scale, const Tensor& pages,
                  int64_t dim) {
  const int64_t count = pages.size(0);
  Expected{"pooled_k", "[P, D]", page_type(pages), {count, dim}, "pages"}.check(pooled_k, pages);
  Expected{"pooled_scale", "[P]", ScalarType::Float, {count}, "pages"}.check(pooled_scale, pages);
  check_memory("pooled_k", pooled_k, support::kPageAlignment);
  check_memory("pooled_scale", pooled_scale, 4);
}

void check_whole_pages(int64_t block_size, int64_t tokens) {
  TORCH_CHECK_VALUE(
      block_size % tokens == 0,
      join("block_size: expected a multiple of page_size = ", tokens, ", got ", block_size));
}

}  // namespace

void check(const PagedPoolArguments& a) {
  const ScalarType type = page_type(a.pages);
  Expected{"pooled_k", "[P, D]", type, {a.pages.size(0), -1}, "pages"}.check(a.pooled_k, a.pages);
  const int64_t dim = a.pooled_k.size(1);
  check_dim("pooled_k", dim);
  check_pages(a.pages, dim);
  const int64_t tokens = page_size(a.pages, dim);
  check_pooled(a.pooled_k, a.pooled_scale, a.pages, dim);
  check_table(a.block_table, a.seq_lens, a.pages, tokens);
  TORCH_CHECK_VALUE(
      !a.new_tokens.has_value() || *a.new_tokens >= 1,
      join("new_tokens: expected at least 1, or None for all, got ", a.new_tokens.value_or(0)));
  check_block_size(a.block_size);
  check_whole_pages(a.block_size, tokens);
  parse_pooling(a.pooling);
  check_apart("pooled_scale", a.pooled_scale, "pooled_k", a.pooled_k);
  for (const auto& [name, output] :
       {std::pair("pooled_k", a.pooled_k), std::pair("pooled_scale", a.pooled_scale)}) {
    check_apart(name, output, "pages", a.pages);
    check_apart(name, output, "block_table", a.block_table);
    check_apart(name, output, "seq_lens", a.seq_lens);
  }
}

void check(const PagedIndexArguments& a) {
  const ScalarType type = page_type(a.pages);
  Expected{"q", "[batch * next_n, H, D]", type, {-1, -1, -1}, "pages"}.check(a.q, a.pages);
  const int64_t dim = a.q.size(2);
  check_dim("q", dim);
  check_pages(a.pages, dim);
  const int64_t tokens = page_size(a.pages, dim);
  check_table(a.block_table, a.seq_lens, a.pages, tokens);
  TORCH_CHECK_VALUE(a.next_n >= 1 && a.next_n <= support::kMaxRows,
                    join("next_n: expected 1 to ", support::kMaxRows, ", got ", a.next_n));
  const int64_t rows = a.block_table.size(0) * a.next_n;
  Expected{"q", "[batch * next_n, H, D]", type, {rows, -1, -1}, "pages"}.check(a.q, a.pages);
  check_sizes(a.q.size(1), dim, a.block_table.size(1) * tokens);
  Expected{"weights", "[batch * next_n, H]", ScalarType::Float, {rows, a.q.size(1)}, "pages"}.check(
      a.weights, a.pages);
  check_pooled(a.pooled_k, a.pooled_scale, a.pages, dim);
  check_block_sizes(a.block_size, a.block_topk, a.topk);
  check_whole_pages(a.block_size, tokens);
  TORCH_CHECK_VALUE(!a.physical || a.pages.size(0) <= support::kMaxKeys / tokens,
                    join("physical: expected at most ", support::kMaxKeys,
                         " tokens in all pages, so that places are int32, got ", a.pages.size(0),
                         " pages of ", tokens));
}

ScalarType page_type(const Tensor& pages) {
  TORCH_CHECK_VALUE(pages.dim() >= 2, join("pages: expected [P, ...], got ", describe(pages)));
  switch (pages.scalar_type()) {
    case ScalarType::Byte: return ScalarType::Float8_e4m3fn;
    case ScalarType::Float:
    case ScalarType::BFloat16:
    case ScalarType::Half: return pages.scalar_type();
    default:
      TORCH_CHECK_TYPE(false,
                       join("pages: expected ", support::kPageTypes, ", got ", describe(pages)));
  }
}

int64_t page_size(const Tensor& pages, int64_t dim) {
  return pages.dim() == 2 ? pages.size(1) / (dim + 4) : pages.size(1);
}

}  // namespace hisa
