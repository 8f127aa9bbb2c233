// fp8 e4m3 to fp16, exact for all 256 values. PTX ISA, "Data Movement and Conversion: cvt".
#pragma once

#include <cstdint>

namespace hisa::cuda::ptx {

#if !defined(HISA_NO_FP8_CVT) && defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
#define HISA_FP8_CVT 1
#else
#define HISA_FP8_CVT 0
#endif
inline constexpr bool kFp8Cvt = HISA_FP8_CVT != 0;  // there is an instruction for it

// Four e4m3 values, lowest byte first, as two pairs of fp16.
__device__ __forceinline__ void widen_e4m3(uint32_t four, uint32_t (&pairs)[2]) {
#if HISA_FP8_CVT
  asm("{ .reg .b16 low, high;\n\t"
      "mov.b32 {low, high}, %2;\n\t"
      "cvt.rn.f16x2.e4m3x2 %0, low;\n\t"
      "cvt.rn.f16x2.e4m3x2 %1, high; }"
      : "=r"(pairs[0]), "=r"(pairs[1])
      : "r"(four));
#else
  // Sign and magnitude move into place, then times 2^8, the difference of the exponents' biases.
  // NOTE: 0x7f is a NaN in e4m3 but would become 480: the carry of magnitude + 1 finds it.
  const uint32_t nan = ((four & 0x7f7f7f7fU) + 0x01010101U) & 0x80808080U;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t order = i == 0 ? 0x1404 : 0x3424;  // bytes 2i, 2i + 1 to bits 8..15, 24..31
    const uint32_t value = __byte_perm(four, 0, order);
    const uint32_t bits = (value & 0x80008000U) | ((value & 0x7f007f00U) >> 1);
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(pairs[i]) : "r"(bits), "r"(0x5c005c00U));
    const uint32_t sign = __byte_perm(nan, 0, order);
    pairs[i] |= sign - (sign >> 5);  // 0x8000 to 0x7c00
  }
#endif
}

}  // namespace hisa::cuda::ptx
