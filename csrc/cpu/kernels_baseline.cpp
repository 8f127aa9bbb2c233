// Runs on every CPU. Slow on x86 machines without FMA instructions, where the C library emulates
// them; the results are the same bits all the same.
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Float8_e4m3fn.h>
#include <torch/headeronly/util/Half.h>

#include "kernels_body.h"

namespace hisa::cpu {
namespace {

template <ElementType type>
inline float load1(const void* source, int64_t i) {
  if constexpr (type == ElementType::kFloat32)
    return static_cast<const float*>(source)[i];
  else if constexpr (type == ElementType::kBFloat16)
    return static_cast<float>(static_cast<const c10::BFloat16*>(source)[i]);
  else if constexpr (type == ElementType::kFloat16)
    return static_cast<float>(static_cast<const c10::Half*>(source)[i]);
  else
    return static_cast<float>(static_cast<const c10::Float8_e4m3fn*>(source)[i]);
}

struct IsaBaseline {
  static constexpr int kLanes = 4;
  static constexpr int kHeads = 3;
  static constexpr int64_t kPackRows = 4;

  struct Vec {
    float lane[kLanes];
  };

  template <class F>
  static Vec each(F f) {
    Vec result;
    for (int i = 0; i < kLanes; ++i) result.lane[i] = f(i);
    return result;
  }
  static Vec broadcast(float x) {
    return each([=](int) { return x; });
  }
  static Vec zero() { return broadcast(0.0F); }
  static Vec load(const float* p) {
    return each([=](int i) { return p[i]; });
  }
  static void store(float* p, Vec x) {
    for (int i = 0; i < kLanes; ++i) p[i] = x.lane[i];
  }
  static Vec fma(Vec a, Vec b, Vec c) {
    return each([=](int i) { return __builtin_fmaf(a.lane[i], b.lane[i], c.lane[i]); });
  }
  static Vec relu(Vec x) {
    return each([=](int i) { return x.lane[i] > 0.0F ? x.lane[i] : 0.0F; });
  }

  template <ElementType type>
  static void widen(const void* source, float* target, int64_t n) {
    for (int64_t i = 0; i < n; ++i) target[i] = load1<type>(source, i);
  }

  template <ElementType type>
  static void pack_rows(const void* const (&rows)[kPackRows], float* target, int64_t dim,
                        int64_t ld) {
    for (int64_t i = 0; i < kPackRows; ++i)
      for (int64_t d = 0; d < dim; ++d)
        target[d * ld + i] = rows[i] == nullptr ? 0.0F : load1<type>(rows[i], d);
  }
};

}  // namespace

const Kernels kBaselineKernels = Body<IsaBaseline>::table("baseline");

}  // namespace hisa::cpu
