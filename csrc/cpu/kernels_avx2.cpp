// Compiled with -mavx2 -mfma -mf16c; runs only where the CPU has them.
#include "isa_avx2.h"
#include "kernels_body.h"

namespace hisa::cpu {
namespace {

// 16 registers: 6 x 2 accumulators, 2 keys, 1 broadcast.
struct IsaAvx2 : IsaAvx2Packing {
  using Vec = __m256;
  static constexpr int kLanes = 8;
  static constexpr int kHeads = 6;

  static Vec zero() { return _mm256_setzero_ps(); }
  static Vec load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, Vec x) { _mm256_storeu_ps(p, x); }
  static Vec broadcast(float x) { return _mm256_set1_ps(x); }
  static Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
  static Vec relu(Vec x) { return _mm256_max_ps(x, zero()); }  // NaN gives the second operand
};

}  // namespace

const Kernels kAvx2Kernels = Body<IsaAvx2>::table("avx2");

}  // namespace hisa::cpu
