// The operators on the CPU.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "../entry_around.h"
#include "../entry_paged.h"
#include "around.h"
#include "float_environment.h"
#include "mask.h"
#include "run.h"

namespace hisa::cpu {
namespace {

constexpr int64_t kMaskGrain = 1 << 16;  // elements of a mask or a selection, worth a thread
constexpr int64_t kRopeGrain = 1 << 14;  // channels that are
constexpr int64_t kPlaceGrain = 64;      // rows of indices that are

struct Cpu {
  static constexpr int64_t kAlignment = 1;
  static constexpr int64_t kFarthest = std::numeric_limits<int64_t>::max();

  explicit Cpu(const Tensor&) {}

  static bool overlaps(const Shape&) { return true; }

  void pool(const PoolParams& params) {
    at::parallel_for(0, params.slots, 1, [&](int64_t begin, int64_t end) {
      const FloatEnvironment environment;
      cpu::pool(params, begin, end);
    });
  }

  void index(const IndexParams& params, const Shape& shape) {
    run_index(make_plan(shape, at::get_num_threads()), params);
  }

  void flat(const FlatParams& params, const Shape& shape) {
    run_flat(make_plan(shape, at::get_num_threads()), params);
  }

  void paged_pool(const PagedPoolParams& params) {
    const int64_t blocks = params.keys.table.sequences * most_blocks(params);
    at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
      const FloatEnvironment environment;
      cpu::pool(params, begin, end);
    });
  }

  void paged_index(const PagedIndexParams& params, const Shape& shape) {
    run_index(make_plan(shape, at::get_num_threads()), params);
    if (!params.physical) return;
    at::parallel_for(0, shape.rows, kPlaceGrain,
                     [&](int64_t begin, int64_t end) { place(params, begin, end); });
  }

  void mask(const MaskParams& params) {
    InterruptPoll poll;
    const int64_t rows = params.entries * params.rows;
    const int64_t grain = std::max<int64_t>(1, kMaskGrain / std::max<int64_t>(1, params.keys));
    const auto scan = [&](int64_t begin, int64_t end, const MaskSummary& summary) {
      return larger(summary, scan_mask(params, begin, end, poll));
    };
    *params.summary = at::parallel_reduce(0, rows, grain, MaskSummary{}, scan, larger);
    poll.raise_if_stopped();
  }

  void rope(const RopeParams& params) {
    const int64_t grain = std::max<int64_t>(1, kRopeGrain / (params.heads * params.dim + 1));
    at::parallel_for(0, params.entries * params.rows, grain, [&](int64_t begin, int64_t end) {
      const FloatEnvironment environment;
      cpu::rope(params, begin, end);
    });
  }

  void fold(const FoldParams& params) {
    at::parallel_for(0, params.count, kRopeGrain, [&](int64_t begin, int64_t end) {
      const FloatEnvironment environment;
      cpu::fold(params, begin, end);
    });
  }

  void complete(const CompleteParams& params) {
    const int64_t grain = std::max<int64_t>(1, kMaskGrain / (params.topk + 1));
    at::parallel_for(0, params.rows, grain,
                     [&](int64_t begin, int64_t end) { cpu::complete(params, begin, end); });
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(hisa, CPU, m) {
  m.impl("pool_keys", &pool_keys<Cpu>);
  m.impl("pool_keys.out", &pool_keys_out<Cpu>);
  m.impl("index", &hisa::index<Cpu>);
  m.impl("index.out", &index_out<Cpu>);
  m.impl("flat_index", &flat_index<Cpu>);
  m.impl("flat_index.out", &flat_index_out<Cpu>);
  m.impl("paged_pool", &paged_pool<Cpu>);
  m.impl("paged_index", &hisa::paged_index<Cpu>);
  m.impl("paged_index.out", &paged_index_out<Cpu>);
  m.impl("mask_windows", &mask_windows<Cpu>);
  m.impl("mask_windows.out", &mask_windows_out<Cpu>);
  m.impl("rope_quantize", &rope_quantize<Cpu>);
  m.impl("rope_quantize.out", &rope_quantize_out<Cpu>);
  m.impl("fold_weights", &fold_weights<Cpu>);
  m.impl("complete", &hisa::complete<Cpu>);
}

}  // namespace hisa::cpu
