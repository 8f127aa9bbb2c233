// Where RoPE finds the two values of a turned channel. Shared by the CPU and the CUDA kernels.
//
//   y[c] = x[own] * cos[angle] + (other's sign) x[other] * sin[angle]
//
// Products and sum are rounded to the type of x one by one, as separate operators of a model would.
#pragma once

#include "params.h"

namespace hisa {

struct Turn {
  int64_t own, other, angle;
  bool minus;  // the product with sin is subtracted

  // For channel c of `turned`. Interleaved pairs come out de-interleaved: first the even ones.
  HISA_HOST_DEVICE static Turn of(int64_t c, int64_t turned, bool interleaved) {
    const int64_t half = turned / 2;
    const bool lower = c < half;
    const int64_t pair = lower ? c : c - half;
    if (interleaved) return {2 * pair + (lower ? 0 : 1), 2 * pair + (lower ? 1 : 0), pair, lower};
    return {c, lower ? c + half : c - half, c, lower};
  }
};

}  // namespace hisa
