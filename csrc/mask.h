// What the values of an attention mask mean, and what a row of them has been found to hold. Shared
// by the CPU and the CUDA kernels.
//
// Values are looked at as bits: neither NaN nor a thread's floating-point settings need care.
#pragma once

#include "params.h"

namespace hisa {

struct BoolMask {
  using Bits = uint8_t;
  HISA_HOST_DEVICE static bool attends(Bits bits) { return bits != 0; }
  HISA_HOST_DEVICE static bool masks(Bits bits) { return bits == 0; }
};

// 0: attend; from -65504, the fp16 minimum, to -inf: masked. Further from zero is higher in bits.
template <class T, T kMinimum, T kInfinity>
struct AdditiveMask {
  using Bits = T;
  HISA_HOST_DEVICE static bool attends(Bits bits) { return static_cast<Bits>(bits << 1) == 0; }
  HISA_HOST_DEVICE static bool masks(Bits bits) { return bits >= kMinimum && bits <= kInfinity; }
};
using Float16Mask = AdditiveMask<uint16_t, 0xFBFF, 0xFC00>;
using BFloat16Mask = AdditiveMask<uint16_t, 0xC780, 0xFF80>;  // -65536: it has no -65504
using Float32Mask = AdditiveMask<uint32_t, 0xC77FE000, 0xFF800000>;
using Float64Mask = AdditiveMask<uint64_t, 0xC0EFFC0000000000, 0xFFF0000000000000>;

// A word that holds nothing but this value.
template <class Bits>
HISA_HOST_DEVICE constexpr uint64_t repeated(Bits bits) {
  return ~uint64_t{0} / static_cast<Bits>(~Bits{0}) * bits;
}

// What some keys of a row hold.
struct MaskRow {
  int32_t first;  // key that is attended to; the largest number if there is none
  int32_t end;    // one past the last one; 0 if there is none
  int32_t count;
  bool unknown;   // a value neither attends nor masks

  HISA_HOST_DEVICE static MaskRow none() { return {INT32_MAX, 0, 0, false}; }

  // `n` keys, from `key` on, that all hold `bits`.
  template <class Mask>
  HISA_HOST_DEVICE void add(int32_t key, int32_t n, typename Mask::Bits bits) {
    const bool attended = Mask::attends(bits);
    if (attended && key < first) first = key;
    if (attended && key + n > end) end = key + n;
    count += attended ? n : 0;
    unknown |= !attended && !Mask::masks(bits);
  }

  // Of a whole row.
  HISA_HOST_DEVICE int32_t start() const { return count == 0 ? 0 : first; }
  HISA_HOST_DEVICE MaskSummary summary() const {
    return {unknown, end - start() != count, end - start(), start()};
  }
};

}  // namespace hisa
