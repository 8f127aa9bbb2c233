// Messages without streams.
//
// NOTE: some compilers link the C++ library statically into an extension, where its streams clash
// with the ones inside libtorch and crash. So messages are joined from strings, and TORCH_CHECK
// gets one.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace hisa {

inline void append(std::string& text, std::string_view piece) { text += piece; }
inline void append(std::string& text, int64_t number) { text += std::to_string(number); }

template <class... Pieces>
std::string join(const Pieces&... pieces) {
  std::string text;
  (append(text, pieces), ...);
  return text;
}

// "[1, 2, 3]"
template <class Numbers>
std::string list(const Numbers& numbers) {
  std::string text = "[";
  for (const int64_t number : numbers)
    text += (text.size() > 1 ? ", " : "") + std::to_string(number);
  return text + "]";
}

}  // namespace hisa
