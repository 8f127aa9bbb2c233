// Where keys lie: from whatever holds them to the pointers that the kernels take.
#pragma once

#include <array>
#include <cstddef>

#include "kernels.h"

namespace hisa::cpu {

inline constexpr int64_t kMostKeys = 256;  // that are located at a time: those of a tile or a block

// A few consecutive keys.
struct Located {
  std::array<const void*, kMostKeys> rows;  // each [dim]
  const float* scale;  // of each, may be null: all 1
};

// Memory that may be fetched before it is needed.
struct Bytes {
  const void* data;
  int64_t count;
};

inline const std::byte* row(const Keys& keys, int64_t n) {
  return static_cast<const std::byte*>(keys.data) + n * keys.stride * element_size(keys.type);
}

// Keys [begin, end), at most kMostKeys.
inline void locate(const Keys& keys, int64_t begin, int64_t end, Located& found) {
  for (int64_t n = begin; n < end; ++n) found.rows[static_cast<size_t>(n - begin)] = row(keys, n);
  found.scale = keys.scale == nullptr ? nullptr : keys.scale + begin;
}

// What keys [begin, end) take.
inline Bytes memory(const Keys& keys, int64_t begin, int64_t end) {
  return {row(keys, begin), (end - begin) * keys.stride * element_size(keys.type)};
}

}  // namespace hisa::cpu
