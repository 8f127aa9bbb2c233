#include "launch.h"

#include <algorithm>
#include <bit>

#include "../../text.h"
#include "../choice.h"

namespace hisa::cuda::sm90 {
namespace {

constexpr int64_t kWorkspace = int64_t{256} << 20;  // of buffers that are not on chip, at most
constexpr int64_t kChunkSizes[] = {kMostChunk, kMostChunk / 2, kMostChunk / 4};
constexpr int64_t kManyRows = 32;  // of a multiprocessor: two launches do not matter
constexpr int kEnoughStages = 4;  // that hide the time a tile takes to come

constexpr int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

Needs find_needs(const Shape& shape, Work work) {
  return shape.type == ElementType::kFloat8E4M3
             ? find_needs<ElementType::kFloat8E4M3>(shape.heads, shape.dim, work)
             : find_needs<ElementType::kBFloat16>(shape.heads, shape.dim, work);
}

// A kernel that selects `count` of `candidates` keys for each row.
Plan make_plan(const Shape& shape, const DeviceLimits& limits, Work work, int64_t candidates,
               int64_t count) {
  Plan plan{};
  plan.work = work;
  const int heads = static_cast<int>(shape.heads);
  plan.group = group_size(heads, static_cast<int>(shape.dim), shape.type, work);
  plan.shared_limit = limits.shared_block;
  plan.device = limits.device;
  const int64_t row_bytes = shape.dim * element_size(shape.type);
  const Needs needs = find_needs(shape, work);

  const bool pairs = work == Work::kRefinePairs;
  const int tile = tile_size(plan.group * heads, heads, row_bytes, shape.type, pairs);
  plan.boxes = make_boxes(is_refine(work) ? shape.block_size : 0, tile);
  const int most_groups = work == Work::kCoarse ? kMaxGroups : work == Work::kRefine ? 3 : 2;

  const bool tight = is_tight(pairs, row_bytes);
  const auto bytes = [&](int groups, int stages, int64_t chunk, bool marked, int64_t capacity) {
    return make_layout(needs.fixed, plan.group, heads, row_bytes,
                       at_hand(tight, plan.group, groups, plan.chunks, shape.topk), stages,
                       plan.boxes, chunk, marked, capacity)
        .total;
  };
  // With as many stages as there is room for; whether there is room for the `least`.
  const auto fits = [&](int groups, int least, int64_t chunk, bool marked, int64_t capacity) {
    plan.groups = groups;
    plan.chunk = chunk;
    plan.capacity = capacity;
    plan.on_chip = true;
    plan.stages = kMaxStages / needs.step * needs.step;
    for (; plan.stages >= least; plan.stages -= needs.step) {
      plan.shared = bytes(groups, plan.stages, chunk, marked, capacity);
      if (plan.shared <= limits.shared_block) return true;
    }
    return false;
  };
  // A buffer of count + chunk never overflows; up to twice the count makes selections rare.
  const auto fits_in_chunks = [&](int least, int64_t chunk) {
    const int64_t room = limits.shared_block - bytes(2, least, chunk, true, 0);
    const int64_t most = room / (plan.group * 2 * 4) / 4 * 4;
    return most >= count + chunk &&
           fits(2, least, chunk, true, std::min(round_up(2 * count + chunk, 4), most));
  };
  const auto choose = [&] {
    const int64_t whole = round_up(candidates, tile * needs.span);
    const int enough = std::max(kEnoughStages, needs.stages);
    // Four chunks, so that each warp can have a row, or two.
    plan.chunks = kMaxChunks;
    if (work == Work::kCoarse && candidates <= kFewBlocks &&
        fits(most_groups, enough, whole, false, 0))
      return;
    plan.chunks = tight ? kTightRows : 2;
    if (fits(most_groups, enough, whole, false, 0) || fits(2, enough, whole, false, 0) ||
        fits(2, needs.stages, whole, false, 0))
      return;
    for (const int least : {enough, needs.stages})
      for (const int64_t chunk : kChunkSizes)
        if (fits_in_chunks(least, chunk)) return;
    for (const int64_t chunk : kChunkSizes)
      if (fits(2, needs.stages, chunk, true, 0)) break;
    plan.capacity = round_up(2 * count + plan.chunk, 4);
    plan.on_chip = false;
  };
  choose();
  plan.grid = std::min<int64_t>((shape.rows + plan.group - 1) / plan.group, limits.multiprocessors);
  if (!plan.on_chip) {
    const int64_t buffers = plan.group * 2 * plan.capacity * 4;
    plan.grid = std::clamp<int64_t>(kWorkspace / buffers, 1, plan.grid);
    plan.workspace = plan.grid * buffers;
  }
  return plan;
}

// By pairs of rows, if there is room for all scores of both, and there are enough pairs to go
// round.
Plan make_refine_plan(const Shape& shape, const DeviceLimits& limits, int64_t tokens) {
  const int64_t count = std::min(shape.topk, tokens);
  const int heads = static_cast<int>(shape.heads);
  const int tile = tile_size(2 * heads, heads, 0, shape.type, true);
  if (has_pairs(heads) && shape.block_size >= tile && shape.block_topk <= kPairBlocks &&
      tokens <= kPairTiles * tile && shape.rows > limits.multiprocessors) {
    const Plan plan = make_plan(shape, limits, Work::kRefinePairs, tokens, count);
    if (plan.chunk >= tokens) return plan;
  }
  return make_plan(shape, limits, Work::kRefine, tokens, count);
}

using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                            const cuuint64_t*, const cuuint32_t*, const cuuint32_t*,
                            CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion,
                            CUtensorMapFloatOOBfill);

// The driver's function, which no library has to be linked for.
cudaError_t find_encode(Encode& encode) {
  static void* found = nullptr;
  static const cudaError_t error = [] {
    cudaDriverEntryPointQueryResult result{};
    const cudaError_t status = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found,
                                                                12000, cudaEnableDefault, &result);
    return status == cudaSuccess && result != cudaDriverEntryPointSuccess ? cudaErrorNotSupported
                                                                          : status;
  }();
  encode = reinterpret_cast<Encode>(found);
  return error;
}

constexpr CUtensorMapDataType kFloats = CU_TENSOR_MAP_DATA_TYPE_FLOAT32;  // of scales

// Of keys and queries.
struct Elements {
  int64_t size;   // bytes
  int64_t panel;  // elements
  CUtensorMapDataType type;

  explicit Elements(const Keys& keys)
      : size(element_size(keys.type)),
        panel(std::min<int64_t>(keys.dim, 128 / size)),
        type(size == 1 ? CU_TENSOR_MAP_DATA_TYPE_UINT8 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16) {}
};

constexpr int64_t kAnyStride = 16;  // that of a single row is no matter

struct Dimension {
  int64_t size;
  int64_t stride;  // bytes; of the innermost one, the element's
  int64_t box;
};

// Of up to three dimensions, the innermost first.
cudaError_t make_map(CUtensorMap& map, CUtensorMapDataType type, const void* data,
                     std::initializer_list<Dimension> dimensions) {
  Encode encode = nullptr;
  if (const cudaError_t error = find_encode(encode)) return error;
  cuuint64_t sizes[3] = {};
  cuuint64_t strides[3] = {};
  cuuint32_t box[3] = {};
  cuuint32_t steps[3] = {1, 1, 1};
  cuuint32_t rank = 0;
  for (const Dimension& d : dimensions) {
    sizes[rank] = static_cast<cuuint64_t>(d.size);
    strides[rank] = static_cast<cuuint64_t>(rank > 0 && d.size == 1 ? kAnyStride : d.stride);
    box[rank++] = static_cast<cuuint32_t>(d.box);
  }
  const auto row = static_cast<int64_t>(box[0] * strides[0]);
  const CUtensorMapSwizzle swizzle = type == kFloats ? CU_TENSOR_MAP_SWIZZLE_NONE
                                     : row == 64     ? CU_TENSOR_MAP_SWIZZLE_64B
                                                     : CU_TENSOR_MAP_SWIZZLE_128B;
  const CUresult result =
      encode(&map, type, rank, const_cast<void*>(data), sizes, strides + 1, box, steps,
             CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// All but the keys.
cudaError_t fill(Params& params, const RowsParams& rows, const Plan& plan, int32_t* kept,
                 char* workspace) {
  params.rows = rows;
  params.kept = kept;
  params.work = plan.work;
  params.one_of_two = plan.one_of_two;
  params.stages = plan.stages;
  params.groups = static_cast<uint32_t>(plan.groups);
  params.chunks = static_cast<uint32_t>(plan.chunks);
  params.boxes = plan.boxes;
  params.rows.chunk = plan.chunk;
  params.rows.capacity = plan.capacity;
  params.rows.workspace = plan.on_chip ? nullptr : workspace;
  const Queries& queries = rows.queries;
  const Elements elements(rows.keys);
  return make_map(params.queries, elements.type, queries.data,
                  {{rows.keys.dim, elements.size, elements.panel},
                   {queries.heads, queries.head_stride * elements.size, queries.heads},
                   {queries.rows, queries.row_stride * elements.size, plan.group}});
}

cudaError_t launch_kernel(const Params& params, const Plan& plan, cudaStream_t stream) {
  return params.scored.type == ElementType::kFloat8E4M3
             ? launch_kernel<ElementType::kFloat8E4M3>(params, plan, stream)
             : launch_kernel<ElementType::kBFloat16>(params, plan, stream);
}

cudaError_t launch_stage(const RowsParams& rows, const Plan& plan, int32_t* kept, char* workspace,
                         cudaStream_t stream) {
  Params params{};
  if (const cudaError_t error = fill(params, rows, plan, kept, workspace)) return error;
  // What the kernel scores is `keys` to it; the windows are of the tokens, in any case.
  const Keys& keys = plan.work == Work::kCoarse ? rows.pooled : rows.keys;
  params.scored = keys;
  const Elements elements(keys);
  if (const cudaError_t error =
          make_map(params.keys, elements.type, keys.data,
                   {{keys.dim, elements.size, elements.panel},
                    {keys.count, keys.stride * elements.size, plan.boxes.keys}}))
    return error;
  if (keys.scale != nullptr) {
    params.scale_offset = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(keys.scale) / 4 % 4);
    if (const cudaError_t error =
            make_map(params.scale, kFloats, keys.scale - params.scale_offset,
                     {{keys.count + params.scale_offset, 4, plan.boxes.scales}}))
      return error;
  }
  return launch_kernel(params, plan, stream);
}

// Refine, of keys in pages.
cudaError_t launch_pages(const RowsParams& rows, const PagedKeys& keys, const Plan& plan,
                         int32_t* kept, char* workspace, cudaStream_t stream) {
  Params params{};
  if (const cudaError_t error = fill(params, rows, plan, kept, workspace)) return error;
  params.work = Work::kRefine;
  params.scored = rows.keys;
  const PageTable& table = keys.table;
  params.pages = {
      .ids = table.ids,
      .stride = table.stride,
      .sequences = static_cast<uint32_t>(table.sequences),
      .width = static_cast<uint32_t>(table.width),
      .pages = static_cast<int32_t>(table.pages),
      .room = static_cast<uint32_t>(keys.room),
      .page_shift = static_cast<uint32_t>(std::countr_zero(static_cast<uint64_t>(keys.page_size)))};
  const Elements elements(rows.keys);
  if (const cudaError_t error =
          make_map(params.keys, elements.type, keys.data,
                   {{keys.dim, elements.size, elements.panel},
                    {keys.page_size, keys.dim * elements.size, plan.boxes.keys},
                    {table.pages, keys.stride, 1}}))
    return error;
  if (keys.scale != nullptr)
    if (const cudaError_t error =
            make_map(params.scale, kFloats, keys.scale,
                     {{keys.page_size, 4, plan.boxes.scales}, {table.pages, keys.scale_stride, 1}}))
      return error;
  return launch_kernel(params, plan, stream);
}

}  // namespace

bool takes(const Shape& shape, const DeviceLimits& limits) {
  if (!kCompiled || !use_hopper || limits.capability != 90) return false;
  if (shape.rows == 0 || shape.keys == 0) return false;
  if (shape.type != ElementType::kFloat8E4M3 && shape.type != ElementType::kBFloat16) return false;
  return std::any_of(std::begin(kVariants), std::end(kVariants), [&](const Variant& variant) {
    return variant.heads == shape.heads && variant.dim == shape.dim;
  });
}

std::string kernel_name(const Shape& shape) {
  return join("cuda/wgmma-", shape.heads, "x", shape.dim);
}

Geometry make_geometry(const Shape& shape, const DeviceLimits& limits) {
  Geometry geometry{};
  geometry.prunes = shape.slots() > shape.block_topk;
  if (!geometry.prunes) {
    geometry.tokens =
        make_plan(shape, limits, Work::kFlat, shape.keys, std::min(shape.topk, shape.keys));
    geometry.workspace = geometry.tokens.workspace;
    return geometry;
  }
  geometry.kept = shape.block_topk;
  const int64_t tokens = geometry.kept * shape.block_size;
  geometry.coarse = make_plan(shape, limits, Work::kCoarse, shape.slots(), geometry.kept);
  geometry.tokens = make_refine_plan(shape, limits, tokens);
  if (geometry.tokens.work == Work::kRefinePairs &&
      shape.rows >= kManyRows * limits.multiprocessors) {
    geometry.other = make_plan(shape, limits, Work::kRefine, tokens, std::min(shape.topk, tokens));
    geometry.tokens.one_of_two = geometry.other.one_of_two = geometry.other.capacity == 0;
  }
  geometry.lists = round_up(shape.rows * geometry.kept * 4, 16);
  geometry.workspace =
      geometry.lists + std::max(geometry.coarse.workspace, geometry.tokens.workspace);
  return geometry;
}

Geometry make_paged_geometry(const Shape& shape, const DeviceLimits& limits, int64_t sequences,
                             int64_t page_size) {
  Geometry geometry{};
  geometry.prunes = true;  // so that rows have lists of blocks, if it is of all
  geometry.kept = std::min(shape.block_topk, shape.slots());
  const int64_t group = group_size(static_cast<int>(shape.heads), static_cast<int>(shape.dim),
                                   shape.type, Work::kCoarse);
  // A group's rows may be of as many sequences, and look at what lies between theirs, too.
  geometry.coarse = make_plan(shape, limits, Work::kCoarse,
                              std::min(group, sequences) * shape.slots(), geometry.kept);
  const int64_t tokens = geometry.kept * shape.block_size;
  Shape in_pages = shape;
  in_pages.block_size = page_size;
  geometry.tokens =
      make_plan(in_pages, limits, Work::kRefinePages, tokens, std::min(shape.topk, tokens));
  geometry.lists = round_up(shape.rows * geometry.kept * 4, 16);
  geometry.workspace =
      geometry.lists + std::max(geometry.coarse.workspace, geometry.tokens.workspace);
  return geometry;
}

cudaError_t launch_paged_rows(RowsParams params, const PagedKeys& keys, const Geometry& geometry,
                              char* workspace, cudaStream_t stream) {
  auto* kept = reinterpret_cast<int32_t*>(workspace);
  char* buffers = workspace + geometry.lists;
  params.kept = geometry.kept;
  if (const cudaError_t error = launch_stage(params, geometry.coarse, kept, buffers, stream))
    return error;
  return launch_pages(params, keys, geometry.tokens, kept, buffers, stream);
}

cudaError_t launch_rows(RowsParams params, const Geometry& geometry, char* workspace,
                        cudaStream_t stream) {
  auto* kept = reinterpret_cast<int32_t*>(workspace);
  char* buffers = workspace + geometry.lists;
  params.kept = geometry.kept;
  if (geometry.prunes)
    if (const cudaError_t error = launch_stage(params, geometry.coarse, kept, buffers, stream))
      return error;
  if (geometry.tokens.one_of_two)
    if (const cudaError_t error = launch_stage(params, geometry.other, kept, buffers, stream))
      return error;
  return launch_stage(params, geometry.tokens, kept, buffers, stream);
}

}  // namespace hisa::cuda::sm90
