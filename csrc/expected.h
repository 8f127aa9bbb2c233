// What a check expects of a tensor, and the message if it is something else.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "text.h"

namespace hisa {

inline std::string dtype_name(at::ScalarType dtype) {
  using at::ScalarType;
  switch (dtype) {
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::Half: return "float16";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Float8_e4m3fn: return "float8_e4m3fn";
    case ScalarType::Float8_e5m2: return "float8_e5m2";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Char: return "int8";
    case ScalarType::Short: return "int16";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Bool: return "bool";
    default: return c10::toString(dtype);
  }
}

// "[4, 64] bfloat16"
inline std::string describe(const at::Tensor& tensor) {
  return join(list(tensor.sizes()), " ", dtype_name(tensor.scalar_type()));
}

// One expectation: `name: expected SHAPE DTYPE, got [..] dtype`. Sizes of -1 are free.
struct Expected {
  const char* name;
  const char* shape;  // as SPEC.md writes it: "[M, H, D]"
  at::ScalarType dtype;
  std::vector<int64_t> sizes;
  const char* beside = "k";  // the argument whose device it has to share

  std::string message(const at::Tensor& got) const {
    std::string known;  // the sizes that are not free
    for (const int64_t size : sizes)
      known += join(known.empty() ? "" : ", ", size < 0 ? "*" : std::to_string(size));
    const bool any = std::any_of(sizes.begin(), sizes.end(), [](int64_t n) { return n >= 0; });
    return join(name, ": expected ", shape, any ? join(" = [", known, "]") : "", " ",
                dtype_name(dtype), ", got ", describe(got));
  }

  void check(const at::Tensor& got, const at::Tensor& other) const {
    TORCH_CHECK_TYPE(got.scalar_type() == dtype, message(got));
    bool same = got.dim() == static_cast<int64_t>(sizes.size());
    for (size_t i = 0; same && i < sizes.size(); ++i)
      same = sizes[i] < 0 || got.sizes()[i] == sizes[i];
    TORCH_CHECK_VALUE(same, message(got));
    TORCH_CHECK_VALUE(got.device() == other.device(),
                      join(name, ": expected a tensor on ", other.device().str(), " as ", beside,
                           " is, got one on ", got.device().str()));
  }

  void check(const std::optional<at::Tensor>& got, const at::Tensor& other) const {
    if (got.has_value()) check(*got, other);
  }
};

}  // namespace hisa
