// Behind C functions: the kernels for Hopper, csrc/cuda/sm90 with the wrappers of this folder in
// place of csrc/cuda/ptx, and the selection of the portable ones.
#include <exception>

#include "call.h"
#include "cuda/sm90/launch.cpp"
#include "cuda/sm90/rows_bf16.cu"
#include "cuda/sm90/rows_fp8.cu"
#include "cuda/sm90/split.h"

namespace hisa::cuda::sm90 {
alignas(1024) char start[kSharedBytes * kMostEmulated];
}

extern "C" {

// 0, or 1 with a text.
int emulate(const Call* call, char* text, int64_t size) {
  using namespace hisa;
  try {
    simt::seed() = call->seed;
    const Shape shape = call->shape();
    const cuda::RowsParams params = call->params();
    // Another device for each size of clusters, as kernels are prepared once for a device.
    const cuda::DeviceLimits limits{90, static_cast<int>(call->multiprocessors), 233472,
                                    call->shared, static_cast<int>(call->split)};
    simt::most_peers() = static_cast<uint32_t>(call->split);
    if (call->split != 0) {
      const auto plan = cuda::sm90::plan_split(shape, limits);
      if (!plan.splits || cuda::sm90::launch_split(params, plan, nullptr) != cudaSuccess)
        throw std::runtime_error("not split");
      return 0;
    }
    const auto geometry = cuda::sm90::make_geometry(shape, limits);
    if (std::max(geometry.coarse.shared, geometry.tokens.shared) > call->shared)
      throw std::runtime_error("does not fit into shared memory");
    std::vector<uint4> workspace(static_cast<size_t>(geometry.workspace / 16 + 1));
    if (cuda::sm90::launch_rows(params, geometry, reinterpret_cast<char*>(workspace.data()),
                                nullptr) != cudaSuccess)
      throw std::runtime_error("not launched");
    return 0;
  } catch (const std::exception& error) {
    std::snprintf(text, static_cast<size_t>(size), "%s", error.what());
    return 1;
  }
}

// Whether rows are refined by pairs, given the blocks of each, [rows, kept].
int pairs_pay(const int32_t* blocks, int64_t rows, int64_t keys, int64_t kept, int64_t block_size,
              char* text, int64_t size) {
  using namespace hisa::cuda;
  sm90::Params params{};
  params.rows.queries.rows = rows;
  params.rows.keys.count = keys;
  params.rows.kept = params.rows.block_topk = kept;
  params.rows.block_shift = std::countr_zero(static_cast<uint64_t>(block_size));
  params.kept = const_cast<int32_t*>(blocks);
  auto& votes = *reinterpret_cast<uint32_t*>(sm90::start);
  votes = 0;
  bool pay = false;
  try {
    simt::Block(640, 0, 1, 0).run([&] { pay = sm90::pairs_pay(params, votes); });
    return pay ? 1 : 0;
  } catch (const std::exception& error) {
    std::snprintf(text, static_cast<size_t>(size), "%s", error.what());
    return -1;
  }
}

// The best `count` of scores [n], by csrc/cuda/select.cuh: at once, or with a chunk and a buffer.
int select_best(const float* scores, int64_t n, int64_t count, int64_t chunk, int64_t capacity,
                uint64_t seed, int32_t* positions, float* chosen, char* text, int64_t size) {
  using namespace hisa::cuda;
  const auto kernel = [&] {
    auto& memory = *reinterpret_cast<SharedMemory*>(sm90::start);
    char* row = sm90::start + kSharedBytes + kHistogram * 4;
    if (threadIdx.x == 0) {
      memory.region = {reinterpret_cast<float*>(row), region_size(chunk, capacity),
                       static_cast<uint32_t>(chunk), static_cast<uint32_t>(capacity)};
      Source source{};
      source.size = static_cast<uint32_t>(n);
      source.blocks = &kSingleBlock;
      source.block_shift = 31;
      memory.stage = {source, static_cast<uint32_t>(count), positions, chosen, true};
      memory.buffered = 0;
      memory.bar = Bar{};
    }
    __syncthreads();
    const Region region = memory.region;
    for (uint32_t begin = 0; begin < n; begin += chunk_at(memory, begin)) {
      const uint32_t part = chunk_at(memory, begin);
      for (uint32_t i = threadIdx.x; i < part; i += kThreads) region.scores[i] = scores[begin + i];
      __syncthreads();
      if (!region.holds(memory.stage.source)) add_to_buffer(memory, begin);
    }
    write_best(memory);
  };
  try {
    simt::Block(kThreads, 0, 1, seed).run(kernel);
    return 0;
  } catch (const std::exception& error) {
    std::snprintf(text, static_cast<size_t>(size), "%s", error.what());
    return 1;
  }
}
}
