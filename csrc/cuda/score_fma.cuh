// Scores with fused multiply-adds, for fp32 keys:
//   score(n) = scale[n] * sum_h weights[h] * relu(dot(q[h], k[n]))
//
// A lane has two keys to itself and adds up kFmaHeads dots of each; the queries lie in shared
// memory and are read by all lanes at once. One fused multiply-add after another over channels,
// then over heads, the key's scale last: the order of the CPU path, and so its bits.
#pragma once

#include "memory.cuh"
#include "source.cuh"

namespace hisa::cuda {

class FmaScorer {
  static constexpr int kKeys = 2;           // of a lane
  static constexpr int kTile = 32 * kKeys;  // keys of a warp at a time

 public:
  static constexpr bool kThree = false;

  __device__ FmaScorer(SharedMemory& memory, char* extra, const Queries& queries, int64_t dim)
      : memory_(memory),
        queries_(queries),
        dim_(static_cast<int>(dim)),
        query_(reinterpret_cast<float4*>(extra)) {}

  // Score the stage's keys from `begin` on, a chunk, into the region, and up to kBehind behind it.
  // All threads call it.
  __device__ void score(uint32_t begin) {
    const Source source = memory_.stage.source;
    const uint32_t n = (chunk_at(memory_, begin) + 3) / 4 * 4;  // as they will be read
    for (group_ = 0; group_ < groups(); ++group_)
      score_group(source, begin, n, memory_.region.scores);
  }

 private:
  __device__ int groups() const {
    return (static_cast<int>(queries_.heads) + kFmaHeads - 1) / kFmaHeads;
  }

  __device__ void score_group(const Source& source, uint32_t begin, uint32_t n, float* scores) {
    load_queries();
    const uint32_t lane = threadIdx.x % 32;
    const uint32_t warp = threadIdx.x / 32;
#pragma unroll 1
    for (uint32_t tile = warp * kTile; tile < n; tile += kWarps * kTile) {
      uint32_t key[kKeys];
      const float4* at[kKeys];
#pragma unroll
      for (int i = 0; i < kKeys; ++i) {
        key[i] = source.key(min(begin + tile + i * 32 + lane, source.size - 1));
        at[i] = reinterpret_cast<const float4*>(source.data + key[i] * uint64_t{source.stride});
      }
      float dots[kKeys][kFmaHeads] = {};
#pragma unroll 1
      for (int d = 0; d < dim_; d += 4) multiply(dots, at, d);
#pragma unroll
      for (int i = 0; i < kKeys; ++i)
        put(dots[i], source.scale == nullptr ? 1.0F : __ldg(source.scale + key[i]), scores,
            tile + i * 32 + lane, n);
    }
  }

  __device__ void load_queries() {
    __syncthreads();  // the ones before may still be in use
    const float* row = static_cast<const float*>(queries_.data) + memory_.m * queries_.row_stride +
                       group_ * kFmaHeads * queries_.head_stride;
    auto* query = reinterpret_cast<float*>(query_);
    for (int i = threadIdx.x; i < dim_ * kFmaHeads; i += kThreads) {
      const int head = i / dim_;
      const int d = i % dim_;
      query[d * kFmaHeads + head] = head < heads() ? row[head * queries_.head_stride + d] : 0.0F;
    }
    __syncthreads();
  }

  __device__ int heads() const {  // of this group
    return min(kFmaHeads, static_cast<int>(queries_.heads) - group_ * kFmaHeads);
  }

  // dots += channels [d, d + 4) of keys and queries.
  __device__ void multiply(float (&dots)[kKeys][kFmaHeads], const float4* const (&at)[kKeys],
                           int d) const {
    float4 key[kKeys];
#pragma unroll
    for (int i = 0; i < kKeys; ++i) key[i] = __ldg(at[i] + d / 4);
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int h = 0; h < kFmaHeads; h += 4) {
        const float4 q = query_[((d + j) * kFmaHeads + h) / 4];
#pragma unroll
        for (int i = 0; i < kKeys; ++i) {
          const float x = j == 0 ? key[i].x : j == 1 ? key[i].y : j == 2 ? key[i].z : key[i].w;
          dots[i][h] = fmaf(q.x, x, dots[i][h]);
          dots[i][h + 1] = fmaf(q.y, x, dots[i][h + 1]);
          dots[i][h + 2] = fmaf(q.z, x, dots[i][h + 2]);
          dots[i][h + 3] = fmaf(q.w, x, dots[i][h + 3]);
        }
      }
  }

  __device__ void put(const float (&dots)[kFmaHeads], float scale, float* scores, uint32_t i,
                      uint32_t n) {
    if (i >= n) return;
    float sum = group_ > 0 ? scores[i] : 0.0F;  // of the groups before, by this same lane
#pragma unroll
    for (int h = 0; h < kFmaHeads; ++h)
      if (h < heads())
        sum = fmaf(memory_.weights[weight_slot(group_ * kFmaHeads + h)], fmaxf(dots[h], 0.0F), sum);
    scores[i] = group_ + 1 == groups() ? sum * scale : sum;
  }

  SharedMemory& memory_;
  const Queries& queries_;
  int dim_;
  float4* query_;  // [dim, kFmaHeads / 4] of four heads each
  int group_ = 0;
};

}  // namespace hisa::cuda
