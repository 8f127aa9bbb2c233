// The checks of what results are written to, in place of new memory. What they print is as in
// checks.cpp. The call's other arguments have been checked before.
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <initializer_list>
#include <vector>

#include "checks.h"
#include "expected.h"
#include "memory.h"
#include "support.h"
#include "text.h"

namespace hisa {
namespace {

using at::ScalarType;
using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

struct Output {
  Expected expected;
  OptionalTensor tensor;  // none where it is not wanted
  int64_t alignment = 1;  // in bytes, where that is more than an element's
};

struct Input {
  const char* name;
  OptionalTensor tensor;
};

void check_output(const Output& output, const Tensor& beside) {
  const Tensor& tensor = *output.tensor;
  output.expected.check(tensor, beside);
  const char* const name = output.expected.name;
  const int64_t alignment = std::max<int64_t>(output.alignment, tensor.element_size());
  const int64_t beyond = reinterpret_cast<intptr_t>(tensor.const_data_ptr()) % alignment;
  TORCH_CHECK_VALUE(tensor.is_contiguous() && beyond == 0,
                    join(name, ": expected a contiguous tensor that begins at a multiple of ",
                         alignment, " bytes, got strides ", list(tensor.strides()),
                         " from an address that is ", beyond, " modulo ", alignment));
  TORCH_CHECK_VALUE(!(at::GradMode::is_enabled() && tensor.requires_grad()),
                    join(name, ": expected a tensor that does not require grad"));
}

// Each output is as the operator would return it, and has memory of its own.
void check_outputs(const Tensor& beside, std::initializer_list<Output> outputs,
                   std::initializer_list<Input> inputs) {
  for (const Output* output = outputs.begin(); output != outputs.end(); ++output) {
    if (!output->tensor.has_value()) continue;
    check_output(*output, beside);
    const char* const name = output->expected.name;
    for (const Output* before = outputs.begin(); before != output; ++before)
      if (before->tensor.has_value())
        check_apart(name, *output->tensor, before->expected.name, *before->tensor);
    for (const Input& input : inputs)
      if (input.tensor.has_value()) check_apart(name, *output->tensor, input.name, *input.tensor);
  }
}

// The two of a selection.
void check_selection(const Tensor& q, int64_t topk, const char* beside, const char* shape,
                     const Tensor& indices, const OptionalTensor& scores,
                     std::initializer_list<Input> inputs) {
  const std::vector<int64_t> sizes = {q.size(0), topk};
  check_outputs(q,
                {{{"indices", shape, ScalarType::Int, sizes, beside}, indices},
                 {{"scores", shape, ScalarType::Float, sizes, beside}, scores}},
                inputs);
}

}  // namespace

void check_output(const PoolArguments& a, const Tensor& pooled_k, const Tensor& pooled_scale) {
  const int64_t slots = (a.k.size(0) + a.block_size - 1) / a.block_size;
  check_outputs(
      a.k,
      {{{"pooled_k", "[ceil(N / block_size), D]", a.k.scalar_type(), {slots, a.k.size(1)}},
        pooled_k,
        support::kPageAlignment},
       {{"pooled_scale", "[ceil(N / block_size)]", ScalarType::Float, {slots}}, pooled_scale}},
      {{"k", a.k}, {"k_scale", a.k_scale}, {"cu_seqlens_k", a.cu_seqlens_k}});
}

void check_output(const IndexArguments& a, const Tensor& indices, const OptionalTensor& scores) {
  check_selection(a.q, a.topk, "k", "[M, topk]", indices, scores,
                  {{"q", a.q},
                   {"k", a.k},
                   {"weights", a.weights},
                   {"k_scale", a.k_scale},
                   {"ks", a.ks},
                   {"ke", a.ke},
                   {"cu_seqlens_k", a.cu_seqlens_k},
                   {"pooled_k", a.pooled_k},
                   {"pooled_scale", a.pooled_scale}});
}

void check_output(const FlatArguments& a, const Tensor& indices, const OptionalTensor& scores) {
  check_selection(a.q, a.topk, "k", "[M, topk]", indices, scores,
                  {{"q", a.q},
                   {"k", a.k},
                   {"weights", a.weights},
                   {"k_scale", a.k_scale},
                   {"ks", a.ks},
                   {"ke", a.ke}});
}

void check_output(const PagedIndexArguments& a, const Tensor& indices,
                  const OptionalTensor& scores) {
  check_selection(a.q, a.topk, "pages", "[batch * next_n, topk]", indices, scores,
                  {{"q", a.q},
                   {"pages", a.pages},
                   {"weights", a.weights},
                   {"block_table", a.block_table},
                   {"seq_lens", a.seq_lens},
                   {"pooled_k", a.pooled_k},
                   {"pooled_scale", a.pooled_scale}});
}

void check_output(const MaskArguments& a, const Tensor& ks, const Tensor& ke,
                  const Tensor& summary) {
  const std::vector<int64_t> rows = {a.mask.size(0), a.mask.size(1)};
  constexpr int64_t kMaxima = sizeof(MaskSummary) / sizeof(int32_t);
  check_outputs(a.mask,
                {{{"ks", "[B, S]", ScalarType::Int, rows, "mask"}, ks},
                 {{"ke", "[B, S]", ScalarType::Int, rows, "mask"}, ke},
                 {{"summary", "[4]", ScalarType::Int, {kMaxima}, "mask"}, summary}},
                {{"mask", a.mask}});
}

void check_output(const RopeArguments& a, const Tensor& y, const OptionalTensor& scale) {
  const ScalarType type = a.quantize ? ScalarType::Float8_e4m3fn : a.x.scalar_type();
  check_outputs(
      a.x,
      {{{"y", "[B, S, H, D]", type, a.x.sizes().vec(), "x"}, y, support::kPageAlignment},
       {{"scale", "[B, S, H]", ScalarType::Float, a.x.sizes().slice(0, 3).vec(), "x"}, scale}},
      {{"x", a.x}, {"cos", a.cos}, {"sin", a.sin}});
}

}  // namespace hisa
