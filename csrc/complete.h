// What unused slots of a selection are filled with. Shared by the CPU and the CUDA kernels.
//
// A row holds `count` positions relative to its window, ascending, then -1. Unused slots get
// positions outside the window, from 0 on; when those run out, the unselected ones inside.
#pragma once

#include "params.h"

namespace hisa {

// A row's window as the selection read it: windows are data, and never trusted.
struct CompleteWindow {
  int64_t start, end;

  HISA_HOST_DEVICE CompleteWindow(const CompleteParams& params, int64_t m)
      : start(within(params.start[m], 0, params.keys)),
        end(within(params.end[m], start, params.keys)) {}

 private:
  HISA_HOST_DEVICE static int64_t within(int64_t x, int64_t low, int64_t high) {
    return x < low ? low : x > high ? high : x;
  }
};

// How many positions come before the first -1.
HISA_HOST_DEVICE inline int64_t count_selected(const int32_t* row, int64_t topk) {
  int64_t low = 0;
  int64_t high = topk;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (row[middle] >= 0)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

// The position for unused slot count + nth.
HISA_HOST_DEVICE inline int64_t filler(const int32_t* row, int64_t count, int64_t nth,
                                       const CompleteWindow& of, int64_t keys) {
  const int64_t window = of.end - of.start;
  if (nth < of.start) return nth;
  if (nth < keys - window) return nth + window;
  // Before selected position i lie row[i] - i unselected ones. So the n-th unselected one is n +
  // the number of selected ones that have no more than n before them.
  const int64_t n = nth - (keys - window);
  int64_t low = 0;
  int64_t high = count;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (row[middle] - middle <= n)
      low = middle + 1;
    else
      high = middle;
  }
  return of.start + n + low;
}

}  // namespace hisa
