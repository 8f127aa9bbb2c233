// The inner loops of the CPU path, one set per instruction set, chosen at run time.
//
// Every set computes the same bits. The order of arithmetic is part of the contract:
//   dot    fused multiply-adds over d = 0, 1, ... starting at +0
//   score  fused multiply-adds weights[h] * relu(dot_h) over h = 0, 1, ... starting at +0,
//          then one multiplication by the key's scale
//   pool   each key times its scale, rounded, then added token by token starting at +0
// relu(x) is x if x > 0 else 0, so a NaN dot contributes 0.
#pragma once

#include "../params.h"

namespace hisa::cpu {

inline constexpr int64_t kTileKeys = 128;  // keys that are packed at a time
inline constexpr int64_t kMaxDim = 256;    // of a pooled block

// A tile of keys, to be converted to fp32 and transposed panel by panel.
struct PackTile {
  const void* const* keys;  // [count] keys of [dim] each; null: zeros
  int64_t count, dim;
  ElementType type;
  float* packed;  // [panels, dim, panel_keys]; keys that fill up the last panel are zeros
};

// One query against a tile of packed keys.
struct ScoreTile {
  const float* query;    // [heads, dim]
  const float* weights;  // [heads]
  const float* packed;   // [panels, dim, panel_keys], see PackTile
  const float* scale;    // [count], may be null: all 1
  int64_t heads, dim;
  int64_t count;  // keys to score
  float* scores;  // [count] rounded up to a whole panel
  const void* ahead;    // bytes that will be read next, fetched meanwhile; may be null
  int64_t ahead_bytes;
};

// One block of keys, to be pooled to one key.
struct PoolBlock {
  const void* const* keys;  // [count] keys of [dim] each
  const float* scale;       // [count], may be null: all 1
  int64_t count, dim;
  ElementType type;
  Pooling pooling;
  float* pooled;  // [dim]
};

struct Kernels {
  const char* name;
  int64_t panel_keys;  // keys that lie side by side in a packed panel; divides kTileKeys

  // Convert n elements to fp32; n is a multiple of 16.
  void (*widen)(ElementType type, const void* source, float* target, int64_t n);
  void (*pack)(const PackTile& tile);
  void (*score)(const ScoreTile& tile);
  void (*pool)(const PoolBlock& block);
};

extern const Kernels kBaselineKernels;
#ifdef HISA_X86
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
#endif

// The best set that this CPU can run, unless set_isa() has chosen another.
const Kernels& kernels();

// Choose a set by name, "auto" for the best. False if this CPU or build does not have it.
bool set_isa(const char* name);
// Names of the sets that this CPU can run, best first, null-terminated.
const char* const* available_isas();

}  // namespace hisa::cpu
