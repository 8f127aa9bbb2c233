// The floating-point settings that results are specified for, whatever a thread came with.
#pragma once

#include <cfenv>

namespace hisa::cpu {

// In scope: round to nearest, subnormals kept.
//
// Rounding mode and flush-to-zero belong to a thread. torch.set_flush_denormal, or a library built
// for fast math, sets them on some threads and not on others, and a row's result would depend on
// which thread ran it.
class FloatEnvironment {
 public:
  FloatEnvironment() {
    std::fegetenv(&saved_);
    std::fesetenv(FE_DFL_ENV);
  }
  ~FloatEnvironment() { std::fesetenv(&saved_); }
  FloatEnvironment(const FloatEnvironment&) = delete;
  FloatEnvironment& operator=(const FloatEnvironment&) = delete;

 private:
  std::fenv_t saved_;
};

}  // namespace hisa::cpu
