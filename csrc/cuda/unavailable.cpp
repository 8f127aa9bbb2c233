// Stands in for the CUDA operators in a build that has none: says so, instead of the dispatcher.
#include <c10/util/Exception.h>
#include <torch/library.h>

#include "../plan.h"
#include "../text.h"

hisa::CallPlan hisa::plan_cuda(const Shape&) {
  TORCH_CHECK_VALUE(false, "device: expected cpu, the device that this build supports, got cuda");
}

void hisa::use_kernels(bool, bool) {}

namespace {

void unavailable(const c10::OperatorHandle& op, torch::jit::Stack*) {
  TORCH_CHECK_VALUE(
      false,
      hisa::join(op.schema().name(),
                 ": expected tensors on the cpu, got CUDA tensors, but "
                 "this build of hisa has no CUDA kernels (python -m hisa shows what was built)"));
}

}  // namespace

TORCH_LIBRARY_IMPL(hisa, CUDA, m) {
  m.impl("pool_keys", torch::CppFunction::makeFromBoxedFunction<&unavailable>());
  m.impl("pool_keys.out", torch::CppFunction::makeFromBoxedFunction<&unavailable>());
  m.impl("index", torch::CppFunction::makeFromBoxedFunction<&unavailable>());
  m.impl("index.out", torch::CppFunction::makeFromBoxedFunction<&unavailable>());
  m.impl("flat_index", torch::CppFunction::makeFromBoxedFunction<&unavailable>());
  m.impl("flat_index.out", torch::CppFunction::makeFromBoxedFunction<&unavailable>());
  m.impl("paged_pool", torch::CppFunction::makeFromBoxedFunction<&unavailable>());
  m.impl("paged_index", torch::CppFunction::makeFromBoxedFunction<&unavailable>());
  m.impl("paged_index.out", torch::CppFunction::makeFromBoxedFunction<&unavailable>());
  m.impl("mask_windows", torch::CppFunction::makeFromBoxedFunction<&unavailable>());
  m.impl("mask_windows.out", torch::CppFunction::makeFromBoxedFunction<&unavailable>());
  m.impl("rope_quantize", torch::CppFunction::makeFromBoxedFunction<&unavailable>());
  m.impl("rope_quantize.out", torch::CppFunction::makeFromBoxedFunction<&unavailable>());
  m.impl("fold_weights", torch::CppFunction::makeFromBoxedFunction<&unavailable>());
  m.impl("complete", torch::CppFunction::makeFromBoxedFunction<&unavailable>());
}
