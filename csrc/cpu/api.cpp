// The operators on the CPU.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "../entry.h"
#include "float_environment.h"
#include "run.h"
#include "stages.h"

namespace hisa::cpu {
namespace {

struct Cpu {
  static constexpr int64_t kAlignment = 1;
  static constexpr int64_t kFarthest = std::numeric_limits<int64_t>::max();

  explicit Cpu(const Tensor&) {}

  void pool(const PoolParams& params) {
    at::parallel_for(0, params.slots, 1, [&](int64_t begin, int64_t end) {
      const FloatEnvironment environment;
      cpu::pool(params, begin, end);
    });
  }

  void index(const IndexParams& params, const Shape& shape) {
    run_groups(make_plan(shape, at::get_num_threads()), params, [&](Group& group) {
      coarse(params, group);
      refine(params, group);
    });
  }

  void flat(const FlatParams& params, const Shape& shape) {
    run_groups(make_plan(shape, at::get_num_threads()), params,
               [&](Group& group) { cpu::flat(params, group); });
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(hisa, CPU, m) {
  m.impl("pool_keys", &pool_keys<Cpu>);
  m.impl("index", &hisa::index<Cpu>);
  m.impl("flat_index", &flat_index<Cpu>);
}

}  // namespace hisa::cpu
