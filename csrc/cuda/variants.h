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

// A warp multiplies a tile of keys while the next one is copied to shared memory.
struct Tile {
  int keys;
  int64_t bytes;  // of shared memory of a block: the tiles to come, and 32 more for each thread
};

// A lane's registers take the queries and a tile: 32 keys, or 16 where the queries leave no room.
constexpr Tile make_tile(const Variant& variant, ElementType type) {
  const bool full = variant.heads * variant.dim == 64 * 128 && element_size(type) == 2;
  const int keys = full || variant.dim > 128 ? 16 : 32;
  return {keys, kWarps * (keys * variant.dim * element_size(type) + int64_t{32} * 32)};
}

}  // namespace hisa::cuda
