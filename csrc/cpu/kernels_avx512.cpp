// Compiled with -mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c; runs only where the CPU
// has them.
#include "isa_avx2.h"
#include "kernels_body.h"

namespace hisa::cpu {
namespace {

// 32 registers: 12 x 2 accumulators, 2 keys, 1 broadcast.
struct IsaAvx512 : IsaAvx2Packing {
  using Vec = __m512;
  static constexpr int kLanes = 16;
  static constexpr int kHeads = 12;

  static Vec zero() { return _mm512_setzero_ps(); }
  static Vec load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, Vec x) { _mm512_storeu_ps(p, x); }
  static Vec broadcast(float x) { return _mm512_set1_ps(x); }
  static Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
  static Vec relu(Vec x) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, zero(), _CMP_GT_OQ), x);
  }
};

}  // namespace

const Kernels kAvx512Kernels = Body<IsaAvx512>::table("avx512");

}  // namespace hisa::cpu
