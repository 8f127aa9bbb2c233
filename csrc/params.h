// Plain structs that carry one call's tensors to the kernels. No torch here.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define HISA_HOST_DEVICE __host__ __device__
#else
#define HISA_HOST_DEVICE
#endif

namespace hisa {

enum class ElementType { kFloat32, kBFloat16, kFloat16, kFloat8E4M3 };
enum class Pooling { kMean, kMax };
enum class MaskType { kBool, kFloat16, kBFloat16, kFloat32, kFloat64 };

HISA_HOST_DEVICE constexpr int64_t element_size(ElementType type) {
  switch (type) {
    case ElementType::kFloat32: return 4;
    case ElementType::kBFloat16: return 2;
    case ElementType::kFloat16: return 2;
    case ElementType::kFloat8E4M3: return 1;
  }
  return 0;
}

// Keys to score: the tokens' own (refine, flat) or one per block (coarse).
struct Keys {
  const void* data;    // [count, dim] of `type`, rows `stride` elements apart
  const float* scale;  // [count] fp32, may be null: all 1
  int64_t count;
  int64_t stride;
  int64_t dim;
  ElementType type;
};

struct Queries {
  const void* data;      // [rows, heads, dim] of the keys' type
  const float* weights;  // [rows, heads] fp32
  int64_t rows;
  int64_t heads;
  int64_t row_stride, head_stride, weights_stride;  // in elements
};

// Which tokens a row may select. Data, so never trusted: see find_row().
struct Windows {
  const int32_t* start;       // [rows], may be null: 0
  const int32_t* end;         // [rows], may be null: number of keys
  const int32_t* cu_seqlens;  // [segments + 1], may be null: one segment, all keys
  int64_t segments;
};

struct Output {
  int32_t* indices;  // [rows, topk], relative to the window's start, ascending, then -1
  float* scores;     // [rows, topk] fp32, may be null
  int64_t topk;
};

struct PoolParams {
  Keys keys;
  Windows windows;      // cu_seqlens and segments only
  void* pooled;         // [slots, dim] of the keys' type
  float* pooled_scale;  // [slots] fp32
  int64_t slots;        // ceil(keys.count / block_size)
  int64_t block_size;
  Pooling pooling;
};

struct IndexParams {
  Queries queries;
  Keys keys;
  Keys pooled;  // slot i: the complete block that holds token i * block_size; none if not needed
  Windows windows;
  Output output;
  int64_t block_size;
  int64_t block_topk;
};

struct FlatParams {
  Queries queries;
  Keys keys;
  Windows windows;  // no segments
  Output output;
};

// The largest of each over all rows of a mask.
struct MaskSummary {
  int32_t unknown;  // 1: a value neither attends nor masks
  int32_t broken;   // 1: what a row attends to is not one range
  int32_t longest;  // range
  int32_t latest;   // start of a range
};

struct MaskParams {
  const void* data;  // [entries, rows, keys] of `type`
  int64_t entries, rows, keys;
  int64_t entry_stride, row_stride, key_stride;  // in elements, may be 0
  MaskType type;
  int32_t* start;  // [entries, rows], 0 where a row attends to nothing
  int32_t* end;    // [entries, rows], likewise
  MaskSummary* summary;
};

// Queries or keys on their way from a projection to the indexer: turned, quantised, or both.
struct RopeParams {
  const void* x;    // [entries, rows, heads, dim] of `type`
  const void* cos;  // [entries or 1, rows, turned] of `type`, may be null: nothing is turned
  const void* sin;  // likewise
  int64_t entries, rows, heads, dim;
  int64_t angle_stride;   // elements from one entry's angles to the next one's, may be 0
  int64_t first, turned;  // channels [first, first + turned) are turned
  bool interleaved;       // in pairs (2i, 2i + 1), not (i, i + turned / 2)
  bool quantize, power_of_two;
  ElementType type;  // not fp8
  void* y;           // as x; fp8 if quantised
  float* scale;      // [entries, rows, heads] fp32 if quantised
};

// Weights of heads on their way to the indexer: weights * factor * scale, each product rounded.
struct FoldParams {
  const void* weights;  // [count] of `type`
  const float* scale;   // [count] fp32, may be null: all 1
  float factor;
  int64_t count;
  ElementType type;  // not fp8
  float* folded;     // [count] fp32
};

// Unused slots of a selection get positions, and all become absolute: see complete.h.
struct CompleteParams {
  int32_t* indices;  // [rows, topk], relative to `start`, ascending, then -1
  const int32_t* start;  // [rows]
  const int32_t* end;    // [rows]
  int64_t rows, topk;
  int64_t keys;
};

}  // namespace hisa
