// Stage `pool`: one representative key per complete block.
//
// Slot i belongs to the block that holds token i * block_size. A complete block of any segment
// holds exactly one such token, so slots never collide, and neither prefix sums nor a count of
// blocks are needed. The slot of an incomplete block is zero, and nothing reads it.
//
// In a paged cache the slot of a block is the id of its last page, and only the blocks that new
// tokens complete are pooled: whatever lies in the other slots stays there.
#include <array>
#include <cstring>

#include "keys.h"
#include "narrow.h"
#include "stages.h"

namespace hisa::cpu {
namespace {

// Write a pooled key, scaled in place if it has to be, and its scale.
void store(float* key, ElementType type, int64_t dim, void* target, float* target_scale) {
  float scale = 1.0F;
  if (type == ElementType::kFloat8E4M3) {
    scale = fp8_scale(key, dim);
    for (int64_t d = 0; d < dim; ++d) key[d] /= scale;
  }
  narrow(type, key, target, dim);
  *target_scale = scale;
}

// Pool the complete block that begins with key `start`.
template <class Params>
void pool_block(const Params& params, int64_t start, std::byte* target, float* target_scale) {
  std::array<float, kMaxDim> key;
  Located found;
  locate(params.keys, start, start + params.block_size, found);
  kernels().pool({
      .keys = found.rows.data(),
      .scale = found.scale,
      .count = params.block_size,
      .dim = params.keys.dim,
      .type = params.keys.type,
      .pooling = params.pooling,
      .pooled = key.data(),
  });
  store(key.data(), params.keys.type, params.keys.dim, target, target_scale);
}

}  // namespace

void pool(const PoolParams& params, int64_t begin, int64_t end) {
  const Keys& keys = params.keys;
  const int64_t bytes = keys.dim * element_size(keys.type);
  for (int64_t slot = begin; slot < end; ++slot) {
    std::byte* target = static_cast<std::byte*>(params.pooled) + slot * bytes;
    const int64_t token = slot * params.block_size;
    const Segment segment = find_segment(params.windows, token, keys.count);
    const int64_t start =
        segment.begin + (token - segment.begin) / params.block_size * params.block_size;
    if (segment.begin >= segment.end || start + params.block_size > segment.end) {
      std::memset(target, 0, static_cast<size_t>(bytes));
      params.pooled_scale[slot] = 1.0F;
      continue;
    }
    pool_block(params, start, target, params.pooled_scale + slot);
  }
}

int64_t most_blocks(const PagedPoolParams& params) {
  return (std::min(params.new_tokens, params.keys.room) + params.block_size - 1) /
         params.block_size;
}

// NOTE: threads may write one slot at a time: sequences that share a page. They write the same.
void pool(const PagedPoolParams& params, int64_t begin, int64_t end) {
  const PagedKeys& keys = params.keys;
  const int64_t most = most_blocks(params);
  int64_t sequence = -1;
  int64_t length = 0;
  for (int64_t i = begin; i < end; ++i) {
    if (i / most != sequence) {
      sequence = i / most;
      length = keys.table.length(sequence, keys.page_size);
    }
    const int64_t block_end = (length / params.block_size - i % most) * params.block_size;
    if (block_end <= 0 || length - block_end >= params.new_tokens) continue;
    const int64_t slot = keys.table.page(sequence, block_end / keys.page_size - 1);
    pool_block(params, sequence * keys.room + block_end - params.block_size,
               static_cast<std::byte*>(params.pooled) + slot * params.pooled_stride,
               params.pooled_scale + slot * params.scale_stride);
  }
}

}  // namespace hisa::cpu
