// The row kernels that are compiled: the one list that dispatch, plans and tests read.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#include "params.h"

namespace hisa::cuda {

// A tensor-core kernel, for each of fp8, bf16 and fp16. fp32 has one kernel for all shapes.
struct Variant {
  int heads;    // handled together
  int dim;      // channels
  bool more;    // takes more heads, in several passes
  bool padded;  // takes fewer channels

  constexpr bool takes(int64_t h, int64_t d) const {
    return (more || h <= heads) && (padded ? d <= dim : d == dim);
  }
};

// The first one that takes a call's H and D is used.
inline constexpr std::array kVariants = {
    Variant{16, 64, false, false},  Variant{32, 64, false, false},  Variant{64, 64, false, false},
    Variant{64, 64, true, false},   Variant{16, 128, false, false}, Variant{32, 128, false, false},
    Variant{64, 128, false, false}, Variant{32, 128, true, false},  Variant{32, 64, true, true},
    Variant{16, 256, true, true},
};

constexpr size_t find_variant(int64_t heads, int64_t dim) {
  size_t i = 0;
  while (i < kVariants.size() && !kVariants[i].takes(heads, dim)) ++i;
  return i;
}

// A warp multiplies tiles of keys, two units each, of up to four tensor-core tiles of 16 heads by 8
// keys; and holds several of them: the one at hand and others on their way.
struct Tile {
  int keys;
  int stages;
  int64_t ring;  // bytes of shared memory of a block for all of them, keys and scales
};

constexpr Tile make_tile(const Variant& variant, ElementType type) {
  constexpr int64_t kMost = 8192;  // bytes of a tile
  const int64_t key = variant.dim * element_size(type);
  int keys = 2 * 8 * 4 * 16 / variant.heads;
  while (keys * key > kMost) keys /= 2;
  const int stages = keys * key <= kMost / 2 ? 3 : 2;
  const int owned = keys <= 32 ? 1 : keys / 32;  // scores of a tile that a lane stores
  return {keys, stages, stages * kWarps * (keys * key + 32 * owned * int64_t{sizeof(float)})};
}

}  // namespace hisa::cuda
