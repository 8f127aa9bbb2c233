// Conversions and the transpose that the AVX2 and the AVX-512 kernels share. Internal linkage: see
// kernels_body.h.
#pragma once

#include <immintrin.h>

#include "../params.h"

namespace hisa::cpu {
namespace {

// Convert 8 elements to fp32, exactly.
template <ElementType type>
inline __m256 load8(const void* source) {
  if constexpr (type == ElementType::kFloat32) {
    return _mm256_loadu_ps(static_cast<const float*>(source));
  } else if constexpr (type == ElementType::kBFloat16) {
    const __m128i bits = _mm_loadu_si128(static_cast<const __m128i*>(source));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  } else if constexpr (type == ElementType::kFloat16) {
    return _mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i*>(source)));
  } else {
    // e4m3 shifted into a half has the same fraction and an exponent that is 8 too small. Halves
    // rather than floats: their subnormals are read exactly even where fp32 flushes to zero.
    const __m128i bytes = _mm_loadl_epi64(static_cast<const __m128i*>(source));
    const __m128i bits = _mm_cvtepu8_epi16(bytes);
    const __m128i magnitude = _mm_and_si128(bits, _mm_set1_epi16(0x7F));
    const __m128i sign = _mm_slli_epi16(_mm_and_si128(bits, _mm_set1_epi16(0x80)), 8);
    const __m128i nan = _mm_cmpeq_epi16(magnitude, _mm_set1_epi16(0x7F));
    __m128i half = _mm_or_si128(_mm_slli_epi16(magnitude, 7), sign);
    half = _mm_or_si128(half, _mm_and_si128(nan, _mm_set1_epi16(0x7E00)));
    return _mm256_mul_ps(_mm256_cvtph_ps(half), _mm256_set1_ps(256.0F));
  }
}

inline void transpose8(__m256 (&r)[8]) {
  __m256 t[8];
  for (int i = 0; i < 4; ++i) {
    t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
  __m256 u[8];
  for (int i = 0; i < 2; ++i) {
    u[4 * i] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
    u[4 * i + 1] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0xEE);
    u[4 * i + 2] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
    u[4 * i + 3] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xEE);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm256_permute2f128_ps(u[i], u[i + 4], 0x20);
    r[i + 4] = _mm256_permute2f128_ps(u[i], u[i + 4], 0x31);
  }
}

struct IsaAvx2Packing {
  static constexpr int64_t kPackRows = 8;

  template <ElementType type>
  static void widen(const void* source, float* target, int64_t n) {
    const char* bytes = static_cast<const char*>(source);
    for (int64_t i = 0; i < n; i += 8)
      _mm256_storeu_ps(target + i, load8<type>(bytes + i * element_size(type)));
  }

  template <ElementType type>
  static void pack_rows(const void* const (&rows)[kPackRows], float* target, int64_t dim,
                        int64_t ld) {
    for (int64_t d = 0; d < dim; d += 8) {
      __m256 r[8];
      for (int i = 0; i < 8; ++i) {
        const char* row = static_cast<const char*>(rows[i]);
        r[i] = row == nullptr ? _mm256_setzero_ps() : load8<type>(row + d * element_size(type));
      }
      transpose8(r);
      for (int i = 0; i < 8; ++i) _mm256_storeu_ps(target + (d + i) * ld, r[i]);
    }
  }
};

}  // namespace
}  // namespace hisa::cpu
