// The operators on CUDA.
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>
#include <bit>

#include "../entry_around.h"
#include "../entry_paged.h"
#include "../support.h"
#include "../text.h"
#include "choice.h"
#include "launch.h"
#include "paged.h"
#include "sm90/launch.h"
#include "sm90/split.h"

namespace hisa::cuda {
namespace {

constexpr int kOldest = 80;  // compute capability 8.0, Ampere

// Of the current device, which has to be supported.
DeviceLimits current_limits() {
  DeviceLimits limits{};
  C10_CUDA_CHECK(get_limits(c10::cuda::current_device(), limits));
  TORCH_CHECK_VALUE(
      limits.capability >= kOldest,
      join("device: expected a GPU of compute capability ", kOldest / 10, ".", kOldest % 10,
           " (Ampere) or newer, got ", limits.capability / 10, ".", limits.capability % 10));
  return limits;
}

struct Cuda {
  static constexpr int64_t kAlignment = 16;
  static constexpr int64_t kFarthest = std::numeric_limits<uint32_t>::max();

  explicit Cuda(const Tensor& k)
      : guard(k.device()),
        stream(c10::cuda::getCurrentCUDAStream()),
        limits(current_limits()),
        bytes(k.options().dtype(at::kByte)) {}

  // The rows of a tensor that the copy engine brings lie apart.
  bool overlaps(const Shape& shape) const { return !sm90::takes(shape, limits); }

  void pool(const PoolParams& params) { C10_CUDA_CHECK(launch_pool(params, stream)); }

  void index(const IndexParams& params, const Shape& shape) {
    run({.queries = params.queries,
         .keys = params.keys,
         .pooled = params.pooled,
         .windows = params.windows,
         .output = params.output,
         .block_topk = params.block_topk,
         .block_shift = std::countr_zero(static_cast<uint64_t>(params.block_size))},
        shape);
  }

  void flat(const FlatParams& params, const Shape& shape) {
    run({.queries = params.queries,
         .keys = params.keys,
         .windows = params.windows,
         .output = params.output},
        shape);
  }

  void paged_pool(const PagedPoolParams& params) {
    C10_CUDA_CHECK(launch_paged_pool(params, stream));
  }

  // See paged.h.
  void paged_index(const PagedIndexParams& params, const Shape& shape) {
    const bool direct = sm90::takes(shape, limits);
    if (direct && sm90::can_split(params) && run_split(params, shape)) return;
    const int64_t kept = std::min(params.block_topk, params.pooled.room) * params.block_size;
    TORCH_CHECK_VALUE(
        direct || params.windows.next_n <= support::kMaxKeys / kept,
        join("next_n: expected next_n rows to keep at most ", support::kMaxKeys,
             " tokens on this GPU, got ", params.windows.next_n, " of up to ", kept, " each"));
    const PagedSizes sizes = size_paged(params, direct);
    const Tensor workspace = allocate(sizes.workspace);
    for (int64_t first = 0; first < params.keys.table.sequences; first += sizes.sequences) {
      const PagedPart part = make_part(params, direct, first, pointer(workspace));
      C10_CUDA_CHECK(gather_pooled(part, stream));
      direct ? run_direct(part, shape) : run_gathered(part, shape);
      if (!direct || params.physical) C10_CUDA_CHECK(place(part, stream));
    }
  }

  void mask(const MaskParams& params) { C10_CUDA_CHECK(launch_mask(params, stream)); }
  void rope(const RopeParams& params) { C10_CUDA_CHECK(launch_rope(params, stream)); }
  void fold(const FoldParams& params) { C10_CUDA_CHECK(launch_fold(params, stream)); }
  void complete(const CompleteParams& params) { C10_CUDA_CHECK(launch_complete(params, stream)); }

 private:
  void run_direct(const PagedPart& part, Shape shape) {
    shape.rows = part.rows();
    const sm90::Geometry geometry =
        sm90::make_paged_geometry(shape, limits, part.count, part.call.keys.page_size);
    const Tensor workspace = allocate(geometry.workspace);
    C10_CUDA_CHECK(sm90::launch_paged_rows(direct_rows(part), keys_of(part), geometry,
                                           pointer(workspace), stream));
  }

  void run_gathered(const PagedPart& part, const Shape& shape) {
    const bool prunes = part.prunes();
    if (prunes && part.kept > 2) run_flat(choose_blocks(part), part.slots(), prunes, shape);
    C10_CUDA_CHECK(gather_tokens(part, stream));
    run_flat(choose_tokens(part), part.kept * part.call.block_size, prunes, shape);
  }

  // A flat call like `shape`, but for its keys, of which a row sees `most` at most, and topk.
  void run_flat(const RowsParams& params, int64_t most, bool budgeted, Shape shape) {
    shape.rows = params.queries.rows;
    shape.keys = most;
    shape.topk = params.output.topk;
    shape.block_size = shape.block_topk = 0;
    shape.pooled = false;
    run(params, shape, budgeted);
  }

  // Run a call by a cluster for each row, if it is one for that.
  template <class Params>
  bool run_split(const Params& params, const Shape& shape) {
    const sm90::SplitPlan plan = sm90::plan_split(shape, limits);
    if (plan.splits) C10_CUDA_CHECK(sm90::launch_split(params, plan, stream));
    return plan.splits;
  }

  void run(const RowsParams& params, const Shape& shape) { run(params, shape, shape.prunes()); }

  void run(const RowsParams& params, const Shape& shape, bool budgeted) {
    if (sm90::takes(shape, limits)) {
      if (run_split(params, shape)) return;
      const sm90::Geometry geometry = sm90::make_geometry(shape, limits);
      const Tensor workspace = allocate(geometry.workspace);
      C10_CUDA_CHECK(sm90::launch_rows(params, geometry, pointer(workspace), stream));
    } else {
      const Geometry geometry = make_geometry(shape, limits, budgeted);
      const Tensor workspace = allocate(geometry.workspace);
      C10_CUDA_CHECK(launch_rows(params, geometry, pointer(workspace), stream));
    }
  }

  Tensor allocate(int64_t size) const { return size > 0 ? at::empty({size}, bytes) : Tensor(); }
  static char* pointer(const Tensor& workspace) {
    return workspace.defined() ? static_cast<char*>(workspace.mutable_data_ptr()) : nullptr;
  }

  c10::cuda::CUDAGuard guard;
  c10::cuda::CUDAStream stream;
  DeviceLimits limits;
  at::TensorOptions bytes;
};

}  // namespace

TORCH_LIBRARY_IMPL(hisa, CUDA, m) {
  m.impl("pool_keys", &pool_keys<Cuda>);
  m.impl("pool_keys.out", &pool_keys_out<Cuda>);
  m.impl("index", &hisa::index<Cuda>);
  m.impl("index.out", &index_out<Cuda>);
  m.impl("flat_index", &flat_index<Cuda>);
  m.impl("flat_index.out", &flat_index_out<Cuda>);
  m.impl("paged_pool", &paged_pool<Cuda>);
  m.impl("paged_index", &hisa::paged_index<Cuda>);
  m.impl("paged_index.out", &paged_index_out<Cuda>);
  m.impl("mask_windows", &mask_windows<Cuda>);
  m.impl("mask_windows.out", &mask_windows_out<Cuda>);
  m.impl("rope_quantize", &rope_quantize<Cuda>);
  m.impl("rope_quantize.out", &rope_quantize_out<Cuda>);
  m.impl("fold_weights", &fold_weights<Cuda>);
  m.impl("complete", &hisa::complete<Cuda>);
}

}  // namespace hisa::cuda

void hisa::use_kernels(bool hopper, bool split) {
  cuda::use_hopper = hopper;
  cuda::use_split = split;
}

hisa::CallPlan hisa::plan_cuda(const Shape& shape) {
  const cuda::DeviceLimits limits = cuda::current_limits();
  const bool hopper = cuda::sm90::takes(shape, limits);
  const bool splits = hopper && cuda::sm90::plan_split(shape, limits).splits;
  const int64_t workspace = splits   ? 0
                            : hopper ? cuda::sm90::make_geometry(shape, limits).workspace
                                     : cuda::make_geometry(shape, limits, shape.prunes()).workspace;
  return {hopper ? cuda::sm90::kernel_name(shape) : cuda::kernel_name(shape),
          workspace + pooled_bytes(shape)};
}
