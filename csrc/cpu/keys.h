// Where keys lie: from whatever holds them to the pointers that the kernels take.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>

#include "../pages.h"
#include "kernels.h"

namespace hisa::cpu {

inline constexpr int64_t kMostKeys = 256;  // that are located at a time: those of a tile or a block

// A few consecutive keys.
struct Located {
  std::array<const void*, kMostKeys> rows;  // each [dim]; null: there is none
  const float* scale;  // of each, may be null: all 1
  std::array<float, kMostKeys> scales;  // brought together, where they do not lie so
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

// Keys of one page, one behind the other. Null: there is no such page.
struct Stretch {
  const std::byte* data;
  const float* scale;
  int64_t count;
};

// From key `n` of a sequence to the end of its page.
inline Stretch stretch(const PagedKeys& keys, int64_t sequence, int64_t n) {
  const int64_t i = n / keys.page_size;
  const int64_t place = n % keys.page_size;
  const int64_t page = keys.table.page(sequence, (i + 1) * keys.entries - 1);
  if (page < 0) return {nullptr, nullptr, keys.page_size - place};
  const auto* data = static_cast<const std::byte*>(keys.data) + page * keys.stride;
  const auto* scale = static_cast<const std::byte*>(keys.scale);
  if (scale != nullptr) scale += page * keys.scale_stride + place * int64_t{sizeof(float)};
  return {data + place * keys.dim * element_size(keys.type), reinterpret_cast<const float*>(scale),
          keys.page_size - place};
}

inline void locate(const PagedKeys& keys, int64_t begin, int64_t end, Located& found) {
  const int64_t row_bytes = keys.dim * element_size(keys.type);
  int64_t sequence = begin / keys.room;
  int64_t n = begin % keys.room;
  found.scale = keys.scale == nullptr ? nullptr : found.scales.data();
  for (int64_t done = 0; done < end - begin;) {
    const Stretch some = stretch(keys, sequence, n);
    const int64_t count = std::min(some.count, end - begin - done);
    for (int64_t i = 0; i < count; ++i) {
      const auto at = static_cast<size_t>(done + i);
      found.rows[at] = some.data == nullptr ? nullptr : some.data + i * row_bytes;
      if (found.scale != nullptr) found.scales[at] = some.data == nullptr ? 0.0F : some.scale[i];
    }
    done += count;
    n += count;
    if (n == keys.room) {
      n = 0;
      ++sequence;
    }
  }
}

// Of keys [begin, end), the part that their first page holds.
inline Bytes memory(const PagedKeys& keys, int64_t begin, int64_t end) {
  const Stretch some = stretch(keys, begin / keys.room, begin % keys.room);
  if (some.data == nullptr) return {nullptr, 0};
  return {some.data, std::min(some.count, end - begin) * keys.dim * element_size(keys.type)};
}

}  // namespace hisa::cpu
