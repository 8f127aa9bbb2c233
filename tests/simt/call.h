// A call of the emulated kernels, and what both families make of it.
#pragma once

#include <bit>
#include <cstdint>

#include "cuda/launch.h"
#include "cuda/limits.h"

struct Call {
  const void *q, *k, *pooled;
  const float *weights, *k_scale, *pooled_scale;
  const int32_t *ks, *ke, *cu_seqlens;
  int64_t rows, keys, heads, dim, segments,
      type,  // an ElementType
      block_size, block_topk, topk, multiprocessors,
      shared,  // bytes that a block can have
      split;   // blocks of a row by the kernel for few rows, or 0; portable: see Portable
  uint64_t seed;
  int32_t* indices;
  float* scores;  // may be null

  hisa::ElementType element() const { return static_cast<hisa::ElementType>(type); }
  bool flat() const { return block_size == 0; }
  hisa::Shape shape() const {
    return {rows, keys, heads, dim, element(), topk, block_size, block_topk, pooled != nullptr};
  }
  hisa::cuda::RowsParams params() const {
    hisa::cuda::RowsParams all{};
    all.queries = {q, weights, rows, heads, heads * dim, dim, heads};
    all.keys = {k, k_scale, keys, dim, dim, element()};
    if (pooled != nullptr)
      all.pooled = {pooled, pooled_scale, shape().slots(), dim, dim, element()};
    all.windows = {ks, ke, cu_seqlens, segments};
    all.output = {indices, scores, topk};
    all.block_topk = flat() ? 0 : block_topk;
    all.block_shift = flat() ? 0 : std::countr_zero(static_cast<uint64_t>(block_size));
    return all;
  }
};
