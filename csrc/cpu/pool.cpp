// Stage `pool`: one representative key per complete block.
//
// Slot i belongs to the block that holds token i * block_size. A complete block of any segment
// holds exactly one such token, so slots never collide, and neither prefix sums nor a count of
// blocks are needed. The slot of an incomplete block is zero, and nothing reads it.
#include <array>
#include <cstring>

#include "keys.h"
#include "narrow.h"
#include "stages.h"

namespace hisa::cpu {
namespace {

void store(float* key, const PoolParams& params, int64_t slot) {
  const int64_t dim = params.keys.dim;
  void* target =
      static_cast<std::byte*>(params.pooled) + slot * dim * element_size(params.keys.type);
  float scale = 1.0F;
  if (params.keys.type == ElementType::kFloat8E4M3) {
    scale = fp8_scale(key, dim);
    for (int64_t d = 0; d < dim; ++d) key[d] /= scale;
  }
  narrow(params.keys.type, key, target, dim);
  params.pooled_scale[slot] = scale;
}

}  // namespace

void pool(const PoolParams& params, int64_t begin, int64_t end) {
  const Keys& keys = params.keys;
  std::array<float, kMaxDim> key;
  Located found;
  for (int64_t slot = begin; slot < end; ++slot) {
    const int64_t token = slot * params.block_size;
    const Segment segment = find_segment(params.windows, token, keys.count);
    const int64_t start =
        segment.begin + (token - segment.begin) / params.block_size * params.block_size;
    if (segment.begin >= segment.end || start + params.block_size > segment.end) {
      const int64_t bytes = keys.dim * element_size(keys.type);
      std::memset(static_cast<std::byte*>(params.pooled) + slot * bytes, 0,
                  static_cast<size_t>(bytes));
      params.pooled_scale[slot] = 1.0F;
      continue;
    }
    locate(keys, start, start + params.block_size, found);
    kernels().pool({
        .keys = found.rows.data(),
        .scale = found.scale,
        .count = params.block_size,
        .dim = keys.dim,
        .type = keys.type,
        .pooling = params.pooling,
        .pooled = key.data(),
    });
    store(key.data(), params, slot);
  }
}

}  // namespace hisa::cpu
