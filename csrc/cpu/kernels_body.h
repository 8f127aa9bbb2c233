// The kernels of kernels.h, written once over a vector type.
//
// Included by one source file per instruction set. Everything has internal linkage: these files are
// compiled with different flags, so they must not share a symbol, nor include a header that would
// make them do so. `Isa` provides
//   Vec, kLanes            a vector of fp32 and its width
//   zero, load, store, broadcast, fma, relu
//   kHeads                 heads per register tile
//   widen<type>(source, target, n)
//   pack_rows<type>(rows, target, dim, ld)  transpose kPackRows keys of `dim` elements; null: zeros
//
// The register tile holds kHeads x 2 vectors of dot products, `dots[h, n] = q[h, :] . keys[:, n]`:
// per d it takes 2 loads of keys and kHeads broadcasts for 2 * kHeads fused multiply-adds.
#pragma once

#include "kernels.h"

namespace hisa::cpu {
namespace {

constexpr int kPanelVectors = 2;

// Call `f` with the element type as a compile-time constant.
template <class F>
inline void with_type(ElementType type, F f) {
  switch (type) {
    case ElementType::kFloat32: return f.template run<ElementType::kFloat32>();
    case ElementType::kBFloat16: return f.template run<ElementType::kBFloat16>();
    case ElementType::kFloat16: return f.template run<ElementType::kFloat16>();
    case ElementType::kFloat8E4M3: return f.template run<ElementType::kFloat8E4M3>();
  }
}

inline int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }

// Memory that will be read next, asked for a cache line at a time while there is arithmetic to do.
struct Ahead {
  const char* next;
  const char* end;

  void step() {
    if (next >= end) return;
    __builtin_prefetch(next, 0, 2);  // to the second level: the first is full of what is in use
    next += 64;
  }
};

template <class Isa>
struct Body {
  using Vec = typename Isa::Vec;
  static constexpr int64_t kPanel = kPanelVectors * Isa::kLanes;
  static_assert(kTileKeys % kPanel == 0, "a tile is a whole number of panels");
  static_assert(kPanel % Isa::kPackRows == 0, "a panel is packed in whole groups of keys");

  struct Widen {
    const void* source;
    float* target;
    int64_t n;
    template <ElementType type>
    void run() {
      Isa::template widen<type>(source, target, n);
    }
  };

  static void widen(ElementType type, const void* source, float* target, int64_t n) {
    with_type(type, Widen{source, target, n});
  }

  struct Pack {
    const PackTile& tile;
    template <ElementType type>
    void run() {
      float* packed = tile.packed;
      for (int64_t panel = 0; panel < tile.count; panel += kPanel, packed += tile.dim * kPanel) {
        for (int64_t group = 0; group < kPanel; group += Isa::kPackRows) {
          const void* rows[Isa::kPackRows];
          for (int64_t i = 0; i < Isa::kPackRows; ++i) {
            const int64_t key = panel + group + i;
            rows[i] = key < tile.count ? tile.keys[key] : nullptr;
          }
          Isa::template pack_rows<type>(rows, packed + group, tile.dim, kPanel);
        }
      }
    }
  };

  static void pack(const PackTile& tile) { with_type(tile.type, Pack{tile}); }

  // Add kHeads heads' share to the scores of one panel: sum[n] += w[h] * relu(q[h] . keys[n]).
  template <int kVectors, int kHeads>
  static inline void add_heads(const float* query, const float* weights, int64_t dim,
                               const float* keys, Ahead& ahead, Vec (&sum)[kVectors]) {
    Vec dots[kHeads][kVectors];
#pragma GCC unroll 16
    for (int h = 0; h < kHeads; ++h) {
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) dots[h][v] = Isa::zero();
    }
    for (int64_t d = 0; d < dim; ++d, keys += kPanel) {
      ahead.step();
      Vec key[kVectors];
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) key[v] = Isa::load(keys + v * Isa::kLanes);
#pragma GCC unroll 16
      for (int h = 0; h < kHeads; ++h) {
        const Vec q = Isa::broadcast(query[h * dim + d]);
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) dots[h][v] = Isa::fma(q, key[v], dots[h][v]);
      }
    }
#pragma GCC unroll 16
    for (int h = 0; h < kHeads; ++h) {
      const Vec w = Isa::broadcast(weights[h]);
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) sum[v] = Isa::fma(w, Isa::relu(dots[h][v]), sum[v]);
    }
  }

  template <int kVectors, int kHeads>
  static inline void add_some_heads(int64_t heads, const float* query, const float* weights,
                                    int64_t dim, const float* keys, Ahead& ahead,
                                    Vec (&sum)[kVectors]) {
    if constexpr (kHeads > 0) {
      if (heads == kHeads)
        return add_heads<kVectors, kHeads>(query, weights, dim, keys, ahead, sum);
      add_some_heads<kVectors, kHeads - 1>(heads, query, weights, dim, keys, ahead, sum);
    }
  }

  // One query against one panel. The heads are cut into register tiles of nearly equal size.
  template <int kVectors>
  static inline void score_panel(const ScoreTile& tile, int64_t first, Ahead& ahead) {
    const float* keys = tile.packed + first * tile.dim;
    Vec sum[kVectors];
    for (Vec& s : sum) s = Isa::zero();
    const int64_t cuts = (tile.heads + Isa::kHeads - 1) / Isa::kHeads;
    for (int64_t cut = 0; cut < cuts; ++cut) {
      const int64_t head = cut * tile.heads / cuts;
      const int64_t heads = (cut + 1) * tile.heads / cuts - head;
      add_some_heads<kVectors, Isa::kHeads>(heads, tile.query + head * tile.dim,
                                            tile.weights + head, tile.dim, keys, ahead, sum);
    }
    for (int v = 0; v < kVectors; ++v) Isa::store(tile.scores + first + v * Isa::kLanes, sum[v]);
  }

  static void score(const ScoreTile& tile) {
    const auto* next = static_cast<const char*>(tile.ahead);
    Ahead ahead{next, next + tile.ahead_bytes};
    for (int64_t first = 0; first < tile.count; first += kPanel) {
      if (tile.count - first > Isa::kLanes)
        score_panel<kPanelVectors>(tile, first, ahead);
      else
        score_panel<1>(tile, first, ahead);
    }
    if (tile.scale != nullptr)
      for (int64_t n = 0; n < tile.count; ++n) tile.scores[n] = tile.scale[n] * tile.scores[n];
  }

  static void pool(const PoolBlock& block) {
    const int64_t dim = block.dim;
    alignas(64) float total[kMaxDim];
    alignas(64) float key[kMaxDim];
    for (int64_t d = 0; d < dim; ++d)
      total[d] = block.pooling == Pooling::kMean ? 0.0F : -__builtin_inff();
    for (int64_t token = 0; token < block.count; ++token) {
      widen(block.type, block.keys[token], key, dim);
      const float scale = block.scale == nullptr ? 1.0F : block.scale[token];
      for (int64_t d = 0; d < dim; ++d) key[d] *= scale;
      if (block.pooling == Pooling::kMean)
        for (int64_t d = 0; d < dim; ++d) total[d] += key[d];
      else  // NaN propagates, as in torch.amax
        for (int64_t d = 0; d < dim; ++d)
          total[d] = key[d] > total[d] || key[d] != key[d] ? key[d] : total[d];
    }
    const float divisor = block.pooling == Pooling::kMean ? static_cast<float>(block.count) : 1.0F;
    for (int64_t d = 0; d < dim; ++d) block.pooled[d] = total[d] / divisor;
  }

  static constexpr Kernels table(const char* name) {
    return Kernels{name, kPanel, &widen, &pack, &score, &pool};
  }
};

}  // namespace
}  // namespace hisa::cpu
