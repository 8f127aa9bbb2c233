// Which tokens a row may select, read defensively: windows and segments are data, never trusted.
// Shared by the CPU and the CUDA kernels.
#pragma once

#include "params.h"

namespace hisa {

// Tokens [begin, end) of one packed sequence. Empty if begin >= end.
struct Segment {
  int64_t begin = 0;
  int64_t end = 0;
};

// Tokens [start, end) of the segment that begins at `origin`. Empty if start >= end.
struct Row {
  int64_t start = 0;
  int64_t end = 0;
  int64_t origin = 0;

  HISA_HOST_DEVICE bool empty() const { return start >= end; }
  HISA_HOST_DEVICE int64_t block(int64_t token, int64_t block_size) const {
    return (token - origin) / block_size;
  }
};

// The segment that holds `token`; empty if there is none.
HISA_HOST_DEVICE inline Segment find_segment(const Windows& windows, int64_t token,
                                             int64_t key_count) {
  if (windows.cu_seqlens == nullptr) return {0, key_count};
  int64_t low = 0;
  int64_t high = windows.segments;  // the last edge at or before `token` is in [low, high)
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    (windows.cu_seqlens[middle] <= token ? low : high) = middle;
  }
  if (windows.segments == 0) return {};
  const int64_t begin = windows.cu_seqlens[low];
  const int64_t edge = windows.cu_seqlens[low + 1];
  const int64_t end = edge < key_count ? edge : key_count;
  if (begin < 0 || token < begin || token >= end) return {};
  return {begin, end};
}

// Row m's window, clamped to [0, key_count) and to its segment.
HISA_HOST_DEVICE inline Row find_row(const Windows& windows, int64_t m, int64_t key_count) {
  const int64_t wanted = windows.start == nullptr ? 0 : windows.start[m];
  const int64_t start = wanted < 0 ? 0 : wanted;
  const int64_t end = windows.end == nullptr ? key_count : windows.end[m];
  const Segment segment = find_segment(windows, start, key_count);
  return {start, end < segment.end ? end : segment.end, segment.begin};
}

}  // namespace hisa
