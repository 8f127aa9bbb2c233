// Launches DeepGEMM's flat indexer on paged caches for Hopper from its kernel headers, without its
// Python package: what deepgemm_launcher.cu is for adjacent keys.
//
//   logits[s * next_n + i, n] = scale(n) * sum_h weights[s * next_n + i, h] * relu(dot(q, key(n)))
//
// Tile sizes, stages, tensor maps and shared memory are those of DeepGEMM's own host code
// (csrc/apis/attention.hpp, csrc/jit_kernels/impls/sm90_fp8_mqa_logits.hpp). A schedule, made by a
// kernel of its own, says where each multiprocessor begins. The kernel writes whole tiles of 256
// keys, the same keys for all rows of a sequence, until a third kernel puts -inf behind each
// row's window.
//
// benchmarks/deepgemm_peer.py compiles this file, with kMultiprocessors on the command line, and
// calls its two functions through ctypes. It includes no torch header.

#include "deepgemm_maps.h"

#include <deep_gemm/impls/sm90_fp8_paged_mqa_logits.cuh>
// NOTE: both headers declare shared memory of this name, of different types, in one namespace.
#define smem_buffer smem_buffer_of_clean_logits
#include <deep_gemm/impls/smxx_clean_logits.cuh>
#undef smem_buffer

namespace {

constexpr uint32_t kDim = 128;
constexpr uint32_t kPage = 64;  // keys
constexpr uint32_t kTileKeys = 256;
constexpr uint32_t kStages = 3;  // for queries and for keys
constexpr uint32_t kLoadThreads = 128;
constexpr uint32_t kGroups = kTileKeys / kPage;  // of 128 threads that multiply
constexpr uint32_t kMostSequences = 128;
constexpr uint32_t kCleanTile = 8192;
constexpr uint32_t kCleanWarps = 8;

struct Params {
  const void* q;              // [batch * next_n, H, 128] fp8
  const void* pages;          // [pages, page_bytes]: 64 * 128 fp8, 64 fp32 scales
  const float* weights;       // [batch * next_n, H]
  const int32_t* lengths;     // [batch], from 1 on
  const int32_t* table;       // [batch, table_stride] ids of pages, all of which exist
  const uint32_t* schedule;   // [kMultiprocessors + 1, 2]
  float* logits;              // [batch * next_n, stride], stride a multiple of 256 keys
  uint32_t batch, heads, pages_count, page_bytes, table_stride, stride;
};

constexpr uint32_t round_up(uint32_t value, uint32_t step) {
  return (value + step - 1) / step * step;
}

template <uint32_t kNextN, uint32_t kHeads>
const char* launch(const Params& p, cudaStream_t stream) {
  constexpr uint32_t kAligned = kDim * 8;  // bytes, of all that is in shared memory
  constexpr uint32_t kBarriers = round_up(kStages * 8 * 2, kAligned);
  constexpr uint32_t kQueryBytes =
      kNextN * kHeads * kDim + round_up(kNextN * kHeads * sizeof(float), kAligned);
  constexpr uint32_t kKeyBytes = kPage * kDim + round_up(kPage * sizeof(float), kAligned);
  constexpr uint32_t kSharedBytes = kStages * kQueryBytes + kBarriers +
                                    kGroups * (kStages * kKeyBytes + kBarriers) + kGroups * 2 * 8 +
                                    4;
  static_assert(kSharedBytes <= 227 * 1024, "more than a block of threads can have on sm_90");

  static const Encoder encode = find_encoder();
  if (encode == nullptr) return kNoEncoder;
  const uint64_t rows = uint64_t{p.batch} * kNextN;
  const auto* scales = static_cast<const char*>(p.pages) + kPage * kDim;
  CUtensorMap q, keys, key_scales, weights;
  const bool described =
      describe(encode,
               {p.q, kBytes, {kDim, rows * kHeads}, {kDim}, {kDim, kNextN * kHeads}, kSwizzle},
               &q) &&
      describe(encode,
               {p.pages,
                kBytes,
                {kDim, kPage, p.pages_count},
                {kDim, p.page_bytes},
                {kDim, kPage, 1},
                kSwizzle},
               &keys) &&
      describe(encode,
               {scales, kFloats, {kPage, p.pages_count}, {p.page_bytes}, {kPage, 1}, kPlain},
               &key_scales) &&
      describe(
          encode,
          {p.weights, kFloats, {kHeads, rows}, {kHeads * sizeof(float)}, {kHeads, kNextN}, kPlain},
          &weights);
  if (!described) return kBadMap;

  auto* kernel =
      &deep_gemm::sm90_fp8_paged_mqa_logits<kNextN, kHeads, kDim, kPage, false, false, kStages,
                                            kStages, kTileKeys, kLoadThreads, kGroups * 128, float>;
  const cudaError_t allowed =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (allowed != cudaSuccess) return cudaGetErrorString(allowed);
  const auto* lengths = reinterpret_cast<const uint32_t*>(p.lengths);
  const auto* table = reinterpret_cast<const uint32_t*>(p.table);
  kernel<<<kMultiprocessors, kLoadThreads + kGroups * 128, kSharedBytes, stream>>>(
      p.batch, p.stride, p.table_stride, lengths, p.logits, table, nullptr, p.schedule, q, keys,
      key_scales, weights);
  auto* clean = &deep_gemm::smxx_clean_logits<kNextN, kCleanTile, kCleanWarps, float>;
  clean<<<kMultiprocessors, kCleanWarps * 32, kCleanTile * sizeof(float), stream>>>(
      static_cast<uint32_t>(rows), p.stride, p.stride, nullptr, lengths, p.logits);
  const cudaError_t launched = cudaGetLastError();
  return launched == cudaSuccess ? nullptr : cudaGetErrorString(launched);
}

}  // namespace

// Both return null, or what went wrong.
extern "C" {

// Writes a schedule for sequences of these lengths.
const char* deepgemm_schedule(const int32_t* lengths, uint32_t* schedule, uint32_t batch,
                              uint32_t next_n, void* stream) {
  if (batch > kMostSequences) return "batch: expected at most 128";
  auto* kernel = &deep_gemm::sched::sm90_paged_mqa_logits_metadata<kMostSequences, kTileKeys,
                                                                   kMultiprocessors>;
  kernel<<<1, 32, kMostSequences * sizeof(uint32_t), static_cast<cudaStream_t>(stream)>>>(
      batch, next_n, false, reinterpret_cast<const uint32_t*>(lengths), nullptr, schedule);
  const cudaError_t launched = cudaGetLastError();
  return launched == cudaSuccess ? nullptr : cudaGetErrorString(launched);
}

// Writes the logits of all rows, -inf behind their windows. Row i of a sequence sees all of it but
// its last next_n - 1 - i tokens.
const char* deepgemm_paged_logits(const void* q, const void* pages, const float* weights,
                                  const int32_t* lengths, const int32_t* table,
                                  const uint32_t* schedule, float* logits, uint32_t batch,
                                  uint32_t next_n, uint32_t heads, uint32_t pages_count,
                                  uint32_t page_bytes, uint32_t table_stride, uint32_t stride,
                                  void* stream) {
  const Params params{q,     pages, weights,     lengths,    table,        schedule, logits,
                      batch, heads, pages_count, page_bytes, table_stride, stride};
  auto* on = static_cast<cudaStream_t>(stream);
  switch (next_n * 1000 + heads) {
    case 1032: return launch<1, 32>(params, on);
    case 1064: return launch<1, 64>(params, on);
    case 2032: return launch<2, 32>(params, on);
    case 2064: return launch<2, 64>(params, on);
    default: return "expected next_n 1 or 2, and 32 or 64 heads";
  }
}

}  // extern "C"
