// Launches DeepGEMM's flat indexer for Hopper from its kernel headers, without its Python package.
//
//   logits[m, n] = k_scale[n] * sum_h weights[m, h] * relu(dot(q[m, h], k[n]))
//
// Tile sizes, stages, tensor maps and shared memory are those of DeepGEMM's own host code
// (csrc/apis/attention.hpp, csrc/jit_kernels/impls/sm90_fp8_mqa_logits.hpp). Its kernel writes
// whole tiles: beyond a row's window there are other scores, or what the memory held before, until
// its second kernel puts -inf there.
//
// benchmarks/deepgemm_peer.py compiles this file, with kMultiprocessors on the command line, and
// calls its one function through ctypes. It includes no torch header.

#include "deepgemm_maps.h"

#include <deep_gemm/impls/sm90_fp8_mqa_logits.cuh>
// NOTE: both headers declare shared memory of this name, of different types, in one namespace.
#define smem_buffer smem_buffer_of_clean_logits
#include <deep_gemm/impls/smxx_clean_logits.cuh>
#undef smem_buffer

namespace {

constexpr uint32_t kDim = 128;
constexpr uint32_t kTileKeys = 256;
constexpr uint32_t kTileHeads = 128;  // of all queries of a tile
constexpr uint32_t kStages = 3;       // for queries and for keys
constexpr uint32_t kLoadThreads = 128;
constexpr uint32_t kMathThreads = 512;
constexpr uint32_t kCleanTile = 8192;
constexpr uint32_t kCleanWarps = 8;

// NOTE: both kernels wait for the kernel before them, which without an attribute of the launch they
// need not; none is set, as in DeepGEMM's default.

struct Params {
  const void* q;         // [M, H, 128] fp8
  const void* k;         // [N, 128] fp8
  const float* k_scale;  // [N], readable up to the next multiple of 4
  const float* weights;  // [M, H]
  const int32_t* ks;     // [M]
  const int32_t* ke;     // [M]
  float* logits;         // [M, stride], M rounded up to a tile, stride to 256 keys
  uint32_t rows, keys, heads, stride;
};

template <uint32_t kHeads>
const char* launch(const Params& p, cudaStream_t stream) {
  constexpr uint32_t kTileRows = kTileHeads / kHeads;
  constexpr uint32_t kQueryBytes = kTileHeads * (kDim + sizeof(float));
  constexpr uint32_t kKeyBytes = kTileKeys * (kDim + sizeof(float));
  constexpr uint32_t kBarrierBytes = 8 * (4 * kStages + 2 * kMathThreads / 128) + 4;
  constexpr uint32_t kSharedBytes = kStages * (kQueryBytes + kKeyBytes) + kBarrierBytes;
  static_assert(kSharedBytes <= 227 * 1024, "more than a block of threads can have on sm_90");

  static const Encoder encode = find_encoder();
  if (encode == nullptr) return kNoEncoder;
  const uint64_t scales = (uint64_t{p.keys} + 3) / 4 * 4;
  CUtensorMap q, k, k_scale, weights;
  const uint64_t heads = uint64_t{p.rows} * kHeads;
  const bool described =
      describe(encode, {p.q, kBytes, {kDim, heads}, {kDim}, {kDim, kTileHeads}, kSwizzle}, &q) &&
      describe(encode, {p.k, kBytes, {kDim, p.keys}, {kDim}, {kDim, kTileKeys}, kSwizzle}, &k) &&
      describe(encode,
               {p.k_scale, kFloats, {scales, 1}, {scales * sizeof(float)}, {kTileKeys, 1}, kPlain},
               &k_scale) &&
      describe(encode,
               {p.weights,
                kFloats,
                {kHeads, p.rows},
                {kHeads * sizeof(float)},
                {kHeads, kTileRows},
                kPlain},
               &weights);
  if (!described) return kBadMap;

  auto* kernel =
      &deep_gemm::sm90_fp8_mqa_logits<kHeads, kDim, false, kTileRows, kTileKeys, kStages, kStages,
                                      kMultiprocessors, kLoadThreads, kMathThreads, float>;
  const cudaError_t allowed =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (allowed != cudaSuccess) return cudaGetErrorString(allowed);
  auto* ks = reinterpret_cast<uint32_t*>(const_cast<int32_t*>(p.ks));
  auto* ke = reinterpret_cast<uint32_t*>(const_cast<int32_t*>(p.ke));
  kernel<<<kMultiprocessors, kLoadThreads + kMathThreads, kSharedBytes, stream>>>(
      p.rows, p.keys, 0, p.stride, ks, ke, p.logits, q, k, k_scale, weights);
  auto* clean = &deep_gemm::smxx_clean_logits<1, kCleanTile, kCleanWarps, float>;
  clean<<<kMultiprocessors, kCleanWarps * 32, kCleanTile * sizeof(float), stream>>>(
      p.rows, p.stride, p.stride, ks, ke, p.logits);
  const cudaError_t launched = cudaGetLastError();
  return launched == cudaSuccess ? nullptr : cudaGetErrorString(launched);
}

}  // namespace

// Writes the logits of all rows, -inf outside of their windows; returns null, or what went wrong.
extern "C" const char* deepgemm_logits(const void* q, const void* k, const float* k_scale,
                                       const float* weights, const int32_t* ks, const int32_t* ke,
                                       float* logits, uint32_t rows, uint32_t keys, uint32_t heads,
                                       uint32_t stride, void* stream) {
  const Params params{q, k, k_scale, weights, ks, ke, logits, rows, keys, heads, stride};
  auto* on = static_cast<cudaStream_t>(stream);
  switch (heads) {
    case 32: return launch<32>(params, on);
    case 64: return launch<64>(params, on);
    default: return "heads: expected 32 or 64";
  }
}
