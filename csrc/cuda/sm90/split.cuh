// The kernel of few rows. All blocks of a row's cluster do the same, but for the keys that they
// score and the results that they write:
//
//   find     the row's window; in pages, how far its sequence goes
//   score    the pooled keys of the row's inner blocks, a part each   -> every peer
//   choose   the best of these, all by themselves                     -> the blocks kept
//   score    the tokens of the blocks kept, a part each               -> the first peer
//   select   the best of these, the first peer alone                  -> the result
//
// So a row waits for memory four times: for its window, for the numbers of its keys, twice for
// keys. A block's warpgroups score tiles of 64 keys in turn, which they copy themselves.
#pragma once

#include "split_row.cuh"
#include "split_select.cuh"

namespace hisa::cuda::sm90 {

template <class C>
class SplitScorer {
 public:
  // It begins to load what does not depend on the row's window.
  __device__ SplitScorer(const SplitParams& params, const SplitMemory<C>& memory, uint32_t m)
      : params_(params), memory_(memory), rank_(ptx::cluster_rank()) {
    copy_queries<C>(params.queries, m, memory.queries);
    ptx::commit_copies();
    const float* weights = params.queries.weights + m * params.queries.weights_stride;
#pragma unroll
    for (uint32_t i = 0; i < C::kHeads / 4; ++i)
      weights_[i] = weights[i / 2 * 8 + threadIdx.x % 4 * 2 + i % 2];
  }

  __device__ __forceinline__ void run(const SplitRow& row) {
    row_ = row;
    prepare_weights();
    ptx::wait_for_copies<0>();
    ptx::fence_async();
    list_blocks();
    // One after the other by the same instructions, which take as long to come as keys do.
#pragma unroll 1
    for (int stage = row_.pruned && row_.kept > 2 ? kBlocks : kTokens; stage <= kTokens; ++stage) {
      const Output& output = params_.output;
      const bool all = stage == kTokens && row_.count == row_.size && output.scores == nullptr;
      const uint32_t skipped = stage == kBlocks ? 0 : row_.skipped;
      const uint32_t n = stage == kBlocks ? row_.inner() : row_.skipped + row_.size;
      float* scores = stage == kBlocks ? memory_.slots : memory_.tokens;
      if (!all && n > 0) {
        const Part part = find_part(n);
        score(stage, scores, skipped, n, part);
        const ScoreRange range = exchange(stage, scores, part);
        if (stage == kBlocks || rank_ == 0)
          SplitSelector(memory_.shared, scores, range, skipped, n, memory_.chosen())
              .select(stage == kBlocks ? row_.kept - 2 : row_.count);
      }
      if (stage == kTokens) {
        ptx::arrive_at_cluster();  // nobody sends anything any more
        if (rank_ > 0) return;
      }
      __syncthreads();
      if (stage == kBlocks)
        list_chosen();
      else
        write(scores + skipped, all);
    }
  }

 private:
  enum { kBlocks, kTokens };  // stages

  __device__ __forceinline__ void prepare_weights() {
    bool huge = false;
#pragma unroll
    for (const float weight : weights_) huge = huge || !(fabsf(weight) <= kMostWeight);
    raised_ = C::kType == ElementType::kFloat8E4M3 && !__any_sync(~0U, huge);
    if (raised_) raise(weights_);
  }

  __device__ int32_t first_token(uint32_t block) const {
    return row_.first_token(block, params_.block_shift);
  }

  // Those that are kept in any case. It ends with a barrier.
  __device__ __forceinline__ void list_blocks() const {
    if (!row_.pruned) {
      for (uint32_t i = threadIdx.x; i < row_.kept; i += C::kThreads)
        memory_.blocks[i] = first_token(row_.first + i);
    } else if (threadIdx.x == 0) {
      memory_.blocks[0] = first_token(row_.first);
      memory_.blocks[row_.kept - 1] = first_token(row_.last);
    }
    __syncthreads();
  }

  // It ends with a barrier.
  __device__ __forceinline__ void list_chosen() const {
    for (uint32_t i = threadIdx.x; i < row_.kept - 2; i += C::kThreads)
      memory_.blocks[i + 1] = first_token(row_.first + 1 + memory_.chosen()[i]);
    __syncthreads();
  }

  // The result; `all`: every token of the row.
  __device__ __forceinline__ void write(const float* from, bool all) const {
    const Output& output = params_.output;
    int32_t* indices = output.indices + row_.m * output.topk;
    float* scores = output.scores == nullptr ? nullptr : output.scores + row_.m * output.topk;
    const uint32_t* chosen = memory_.chosen();
    const auto topk = static_cast<uint32_t>(output.topk);
#pragma unroll 4
    for (uint32_t i = threadIdx.x; i < topk; i += C::kThreads) {
      const bool used = i < row_.count;
      const uint32_t position = !used || all ? i : chosen[i];
      int32_t index = -1;
      if (used) {
        const uint32_t token = token_at(position + row_.skipped);
        index = static_cast<int32_t>(params_.physical ? number_of(token)
                                                      : token - static_cast<uint32_t>(row_.start));
      }
      indices[i] = index;
      if (scores != nullptr) scores[i] = used ? from[position] : -INFINITY;
    }
  }

  // Of the blocks kept, laid end to end.
  __device__ uint32_t token_at(uint32_t i) const {
    return static_cast<uint32_t>(memory_.blocks[i >> params_.block_shift]) +
           (i & ((1U << params_.block_shift) - 1));
  }
  // Where a token's key is, in storage.
  __device__ uint32_t number_of(uint32_t token) const {
    if (row_.ids == nullptr) return token;
    const int shift = params_.page_shift;
    return static_cast<uint32_t>(row_.ids[token >> shift]) << shift | (token & ((1U << shift) - 1));
  }
  // Where the pooled key of an inner block is: in pages, at the page of the block's last token.
  __device__ uint32_t number_of_inner(uint32_t i) const {
    const uint32_t block = row_.first + 1 + i;
    const uint32_t size = 1U << params_.block_shift;
    if (row_.ids != nullptr) return number_of((block + 1) * size - 1) >> params_.page_shift;
    return ((static_cast<uint32_t>(row_.origin) + size - 1) >> params_.block_shift) + block;
  }

  // Tiles of n scores: of all peers, and this block's.
  struct Part {
    uint32_t tiles, begin, end;
  };
  __device__ Part find_part(uint32_t n) const {
    const uint32_t tiles = (n + C::kTile - 1) / C::kTile;
    return {tiles, tiles * rank_ / params_.peers, tiles * (rank_ + 1) / params_.peers};
  }

  // Where keys [skipped, n) of this block's part are; all else in its tiles is nowhere. It ends
  // with a barrier.
  __device__ __forceinline__ void find_numbers(int stage, uint32_t* numbers, uint32_t skipped,
                                               uint32_t n, Part part) const {
    const auto find = [&](auto number) {
#pragma unroll 4
      for (uint32_t i = part.begin * C::kTile + threadIdx.x; i < part.end * C::kTile;
           i += C::kThreads) {
        const uint32_t found = number(min(max(i, skipped), n - 1));
        numbers[i] = i < skipped || i >= n ? kNowhere : found;
      }
    };
    if (stage == kBlocks)
      find([&](uint32_t i) { return number_of_inner(i); });
    else
      find([&](uint32_t i) { return number_of(token_at(i)); });
    __syncthreads();
  }

  // Score this block's part of keys [skipped, n).
  __device__ __forceinline__ void score(int stage, float* scores, uint32_t skipped, uint32_t n,
                                        Part part) const {
    // The numbers lie where the scores will.
    auto* numbers = reinterpret_cast<uint32_t*>(scores);
    find_numbers(stage, numbers, skipped, n, part);

    const Storage& storage = stage == kBlocks ? params_.pooled : params_.keys;
    const uint32_t scorer = __shfl_sync(~0U, threadIdx.x / 128, 0);
    char* keys = memory_.keys + scorer * C::kStages * C::kTileBytes;
    float* scale = memory_.scale + scorer * C::kStages * C::kTile;
    const uint32_t key =
        threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4 + threadIdx.x % 4 / 2 * 8;
    uint32_t next = part.begin + scorer;  // tile to copy
    uint32_t filled = 0;  // and its buffer
    const auto copy = [&] {
      if (next < part.end)
        copy_tile<C>(storage, numbers + next * C::kTile, keys + filled * C::kTileBytes,
                     scale + filled * C::kTile);
      ptx::commit_copies();
      next += C::kScorers;
      filled = filled + 1 == C::kStages ? 0 : filled + 1;
    };
#pragma unroll 1
    for (int i = 0; i < C::kStages; ++i) copy();
    uint32_t buffer = 0;
    float low = INFINITY;
    float high = -INFINITY;
    // NOTE: all scorers take as many turns, with tiles or without, since racecheck follows barriers
    // of all threads only where these have met at as many others.
#pragma unroll 1
    for (uint32_t first = part.begin; first < part.end; first += C::kScorers) {
      ptx::wait_for_copies<C::kStages - 2>();
      ptx::fence_async();
      ptx::sync_warpgroup(scorer);  // the tile is there, and the one before is done with
      const uint32_t tile = first + scorer;
      if (tile >= part.end) continue;
      if (first > part.begin) copy();
      float dots[C::kHeads / 2];
      multiply<C>(dots, ptx::shared_address(keys) + buffer * C::kTileBytes,
                  ptx::shared_address(memory_.queries));
      const float of_key = scale[buffer * C::kTile + key];
      ptx::wait_for_products<0>();
      ptx::pin(dots);
      float sums[2];
      weigh<C::kHeads, 1>(weights_, dots, sums, raised_);
      fold<2, 2>(sums);
      fold<1, 1>(sums);
      const float score = sums[0] * of_key;
      if (threadIdx.x % 2 == 0) scores[tile * C::kTile + key] = score;
      low = fminf(low, score);
      high = fmaxf(high, score);
      buffer = buffer + 1 == C::kStages ? 0 : buffer + 1;
    }
    ptx::wait_for_copies<0>();
    const uint32_t lowest = __reduce_min_sync(~0U, to_key(low));
    const uint32_t highest = __reduce_max_sync(~0U, to_key(high));
    if (threadIdx.x % 32 == 0) memory_.shared.range[threadIdx.x / 32] = {lowest, highest};
  }

  // Send this block's part of scores to those who select among them, and wait for theirs; returns
  // the range of all. It has two barriers.
  __device__ __forceinline__ ScoreRange exchange(int stage, const float* scores, Part part) const {
    SplitShared& shared = memory_.shared;
    const uint32_t size = part.end - part.begin;  // tiles
    const uint32_t lane = threadIdx.x % 32;
    const uint32_t receivers = stage == kBlocks ? params_.peers : 1;
    const bool sends = lane < receivers && lane != rank_;
    ScoreRange* ranges = shared.ranges[stage];
    ptx::fence_async();
    __syncthreads();
    begin_selection(shared, memory_.chosen());
    if (threadIdx.x / 32 == 0) {
      if (rank_ < receivers)
        memory_.full(stage).arrive_and_expect((part.tiles - size) * C::kTile * 4 +
                                              (params_.peers - 1) * sizeof(ScoreRange));
      const ScoreRange own = merge(shared.range[lane % kSplitWarps]);
      if (lane == 0) ranges[rank_] = own;
      ptx::fence_async();
      __syncwarp();
      if (sends) ptx::copy_to_peer(lane, ranges + rank_, sizeof(ScoreRange), memory_.full(stage));
    } else if (threadIdx.x / 32 == 1 && sends && size > 0) {
      ptx::copy_to_peer(lane, scores + part.begin * C::kTile, size * C::kTile * 4,
                        memory_.full(stage));
    }
    __syncthreads();
    if (rank_ < receivers) memory_.full(stage).wait(0);
    return merge(ranges[min(lane, params_.peers - 1)]);
  }

  // Of all lanes.
  __device__ static ScoreRange merge(ScoreRange mine) {
    return {__reduce_min_sync(~0U, mine.low), __reduce_max_sync(~0U, mine.high)};
  }

  const SplitParams& params_;
  const SplitMemory<C>& memory_;
  const uint32_t rank_;
  SplitRow row_;
  float weights_[C::kHeads / 4];  // of the lane's heads, see weigh()
  bool raised_;
};

template <class C>
__global__ void __launch_bounds__(C::kThreads, C::kBlocks)
    split_kernel(const __grid_constant__ SplitParams params) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) char start[];
  const SplitMemory<C> memory(start, params.at);
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; ++i) memory.full(i).init(1);
    ptx::fence_barrier_init();
  }
  ptx::arrive_at_cluster();
  ptx::let_next_kernel_start();
  ptx::wait_for_previous_kernel();
  const uint32_t m = blockIdx.x / params.peers;
  SplitScorer<C> scorer(params, memory, m);
  ptx::wait_for_cluster();  // peers' barriers are there
  scorer.run(describe_split(params, memory.shared, m));
  ptx::wait_for_cluster();  // nobody reads this block's scores any more
#endif
}

}  // namespace hisa::cuda::sm90
