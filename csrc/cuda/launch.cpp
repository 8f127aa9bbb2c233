#include "launch.h"

#include <algorithm>

#include "../text.h"
#include "choice.h"
#include "memory.cuh"
#include "split.h"
#include "variants.h"

namespace hisa::cuda {
namespace {

constexpr int64_t kReserved = 1024;  // bytes of shared memory that the driver takes per block
constexpr int64_t kWorkspace = int64_t{256}
                               << 20;  // of a call whose buffers are not on chip, at most
constexpr int64_t kSplitScores = int64_t{32} << 20;  // of a call whose rows are split

constexpr std::array<int64_t, 3> kChunks = {4096, 2048, 1024};  // the first that fits

constexpr int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// Few rows: into as many parts as there can be blocks of threads at once, of one wave. Whether that
// is several, and what they collect is not too much.
bool split(const Shape& shape, const DeviceLimits& limits, int64_t blocks, int64_t tokens,
           Geometry& geometry) {
  const int64_t at_once = kBlocksPerMultiprocessor * limits.multiprocessors;
  const auto parts = [&](int64_t positions) {
    return std::min(at_once / std::max<int64_t>(shape.rows, 1),
                    round_up(positions, kPartStep) / kPartStep);
  };
  geometry.block_parts = parts(blocks);
  geometry.token_parts = parts(tokens);
  if (!use_split || std::max(geometry.block_parts, geometry.token_parts) <= 1) return false;
  geometry.chunk = round_up(std::max(blocks, tokens), 4);
  geometry.workspace = shape.rows * row_bytes(geometry.chunk, 0, geometry.kept);
  return geometry.workspace <= kSplitScores;
}

template <class Launch>
cudaError_t for_type(ElementType type, Launch launch) {
  switch (type) {
    case ElementType::kFloat32: return launch.template operator()<ElementType::kFloat32>();
    case ElementType::kBFloat16: return launch.template operator()<ElementType::kBFloat16>();
    case ElementType::kFloat16: return launch.template operator()<ElementType::kFloat16>();
    case ElementType::kFloat8E4M3: return launch.template operator()<ElementType::kFloat8E4M3>();
  }
  return cudaErrorInvalidValue;
}

cudaError_t launch_stage(const SplitStage& stage, const Geometry& geometry, cudaStream_t stream) {
  if (stage.parts > 0) {
    const auto error = for_type(stage.call.keys.type, [&]<ElementType kType> {
      return launch_scores_of<kType>(stage, geometry, stream);
    });
    if (error != cudaSuccess) return error;
  }
  return launch_select(stage, stream);
}

cudaError_t launch_split(const RowsParams& params, const Geometry& geometry, cudaStream_t stream) {
  if (geometry.prunes) {
    const SplitStage coarse{params, true, static_cast<uint32_t>(geometry.block_parts)};
    if (const auto error = launch_stage(coarse, geometry, stream)) return error;
  }
  const SplitStage tokens{params, false, static_cast<uint32_t>(geometry.token_parts)};
  return launch_stage(tokens, geometry, stream);
}

}  // namespace

Geometry make_geometry(const Shape& shape, const DeviceLimits& limits, bool budgeted) {
  Geometry geometry{};
  geometry.shared_limit = limits.shared_block;
  geometry.device = limits.device;
  geometry.variant = find_variant(shape.heads, shape.dim);
  geometry.kept = std::min(shape.block_topk, shape.slots());

  // Candidates of a stage, and how many of them it keeps.
  const int64_t tokens =
      shape.flat() ? shape.keys : std::min(geometry.kept * shape.block_size, shape.keys);
  geometry.prunes = shape.prunes();
  const int64_t blocks = geometry.prunes && shape.block_topk > 2 ? shape.slots() : 0;
  const int64_t candidates = std::max(tokens, blocks);
  const int64_t count = std::max(std::min(shape.topk, tokens), geometry.kept);

  // A buffer of count + chunk never overflows; twice the count makes selections rare. A region
  // that takes all candidates at once needs just one, and no buffer.
  const auto region = [&](int64_t chunk, int64_t spare) {
    const int64_t whole = round_up(candidates, 4);
    const int64_t capacity = round_up(count + chunk + spare, 4);
    geometry.chunk = chunk;
    geometry.capacity = std::min(capacity, round_up((whole - chunk) / 2, 4));
    if (whole <= chunk) {
      geometry.chunk = whole;
      geometry.capacity = 0;
    }
    return row_bytes(geometry.chunk, geometry.capacity, geometry.kept);
  };
  // The histogram of a selection lies where the scorer has its tiles or queries.
  geometry.scorer_bytes = std::max(int64_t{kHistogram} * 4,
                                   shape.type == ElementType::kFloat32
                                       ? shape.dim * kFmaHeads * 4
                                       : make_tile(kVariants[geometry.variant], shape.type).bytes);
  const int64_t fixed = kSharedBytes + geometry.scorer_bytes;
  geometry.shared = fixed;
  geometry.splits = budgeted && split(shape, limits, blocks, tokens, geometry);
  if (geometry.splits) return geometry;
  geometry.workspace = 0;
  const int64_t half = limits.shared_total / kBlocksPerMultiprocessor - kReserved - fixed;
  const int64_t all = limits.shared_block - fixed;
  const int64_t limit = region(kChunks.back(), 0) <= half ? half : all;
  int64_t row = 0;
  for (const int64_t chunk : kChunks) {
    geometry.on_chip = true;
    if ((row = region(chunk, count)) <= limit) break;
    if ((row = region(chunk, 0)) <= limit) break;
    geometry.on_chip = false;
  }
  geometry.grid = shape.rows;
  geometry.shared = fixed + row;
  if (!geometry.on_chip) {
    row = region(kChunks.front(), count);
    geometry.shared = fixed;
    geometry.grid = std::min(
        shape.rows, std::clamp<int64_t>(kWorkspace / row, 1,
                                        kBlocksPerMultiprocessor * limits.multiprocessors));
    geometry.workspace = geometry.grid * row;
  }
  return geometry;
}

std::string kernel_name(const Shape& shape) {
  if (shape.type == ElementType::kFloat32) return "cuda/fma";
  const Variant& variant = kVariants[find_variant(shape.heads, shape.dim)];
  return join("cuda/mma-", variant.heads, "x", variant.dim);
}

cudaError_t launch_rows(RowsParams params, const Geometry& geometry, char* workspace,
                        cudaStream_t stream) {
  params.workspace = workspace;
  params.kept = geometry.kept;
  params.scorer_bytes = geometry.scorer_bytes;
  params.chunk = geometry.chunk;
  params.capacity = geometry.capacity;
  if (params.queries.rows == 0) return cudaSuccess;
  if (geometry.splits) return launch_split(params, geometry, stream);
  return for_type(params.keys.type, [&]<ElementType kType> {
    return launch_rows_of<kType>(params, geometry, stream);
  });
}

}  // namespace hisa::cuda
