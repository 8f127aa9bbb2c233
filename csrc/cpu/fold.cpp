// Weights as the indexer takes them, one after the other.
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "around.h"

namespace hisa::cpu {
namespace {

template <class T>
void fold_of(const FoldParams& params, int64_t begin, int64_t end) {
  const T* const weights = static_cast<const T*>(params.weights);
  for (int64_t i = begin; i < end; ++i) {
    const float product = static_cast<float>(weights[i]) * params.factor;
    params.folded[i] = params.scale != nullptr ? product * params.scale[i] : product;
  }
}

}  // namespace

void fold(const FoldParams& params, int64_t begin, int64_t end) {
  switch (params.type) {
    case ElementType::kBFloat16: return fold_of<c10::BFloat16>(params, begin, end);
    case ElementType::kFloat16: return fold_of<c10::Half>(params, begin, end);
    default: return fold_of<float>(params, begin, end);
  }
}

}  // namespace hisa::cpu
