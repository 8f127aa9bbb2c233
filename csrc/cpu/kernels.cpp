#include "kernels.h"

#include <array>
#include <atomic>
#include <cstring>

#include "../support.h"
#include "keys.h"

namespace hisa::cpu {
namespace {

static_assert(kMaxDim == support::kMaxDim, "pooled keys are collected on the stack");
static_assert(kMostKeys == support::kBlockSizes.back() && kMostKeys >= kTileKeys,
              "keys are located on the stack");

constexpr int kMaxSets = 3;

struct Available {
  std::array<const Kernels*, kMaxSets> sets{};     // best first
  std::array<const char*, kMaxSets + 1> names{};  // null-terminated
  int count = 0;

  void add(const Kernels& set) {
    sets[static_cast<size_t>(count)] = &set;
    names[static_cast<size_t>(count)] = set.name;
    ++count;
  }

  Available() {
#ifdef HISA_X86
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("f16c");
    if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
      add(kAvx512Kernels);
    if (avx2) add(kAvx2Kernels);
#endif
    add(kBaselineKernels);
  }
};

const Available& available() {
  static const Available sets;
  return sets;
}

std::atomic<const Kernels*> chosen{nullptr};  // null: the best

}  // namespace

const Kernels& kernels() {
  const Kernels* set = chosen.load(std::memory_order_relaxed);
  return set != nullptr ? *set : *available().sets[0];
}

bool set_isa(const char* name) {
  if (std::strcmp(name, "auto") == 0) {
    chosen.store(nullptr);
    return true;
  }
  for (int i = 0; i < available().count; ++i) {
    const Kernels* set = available().sets[static_cast<size_t>(i)];
    if (std::strcmp(name, set->name) == 0) {
      chosen.store(set);
      return true;
    }
  }
  return false;
}

const char* const* available_isas() { return available().names.data(); }

}  // namespace hisa::cpu
