// Whether tensors share memory.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include "text.h"

namespace hisa {

// Memory of a tensor's entries along its first dimension, in bytes.
struct Entries {
  intptr_t begin;
  int64_t count;
  int64_t size;  // from the first to the last byte of one
  int64_t stride;

  explicit Entries(const at::Tensor& tensor)
      : begin(reinterpret_cast<intptr_t>(tensor.const_data_ptr())),
        count(tensor.numel() == 0 ? 0 : tensor.size(0)),
        size(tensor.element_size()),
        stride(tensor.stride(0) * tensor.element_size()) {
    for (int64_t d = 1; d < tensor.dim(); ++d)
      size += (tensor.size(d) - 1) * tensor.stride(d) * tensor.element_size();
  }

  intptr_t end() const { return begin + (count - 1) * stride + size; }

  // Whether no byte is in both. Entries may lie between each other, as where a page is followed by
  // its pooled key.
  bool apart(const Entries& other) const {
    if (count == 0 || other.count == 0) return true;
    if (end() <= other.begin || other.end() <= begin) return true;
    if (stride != other.stride || stride == 0) return false;
    const int64_t ahead = ((other.begin - begin) % stride + stride) % stride;
    return ahead >= size && ahead + other.size <= stride;
  }
};

inline void check_apart(const char* name, const at::Tensor& output, const char* other,
                        const at::Tensor& input) {
  TORCH_CHECK_VALUE(Entries(output).apart(Entries(input)),
                    join(name, ": expected memory of its own, got some that ", other, " has"));
}

}  // namespace hisa
