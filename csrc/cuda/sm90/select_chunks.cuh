// The warpgroup that selects, where some rows do not fit into a chunk: what is still in the running
// of each row is kept in a buffer.
//
// Once a buffer has been cut, its row has a bar, and the scorers mark which scores pass it, so that
// of most chunks little is even read.
#pragma once

#include "select.cuh"

namespace hisa::cuda::sm90 {

template <class C>
class ChunkSelector {
 public:
  __device__ ChunkSelector(const Params& params, const Memory<C>& memory)
      : params_(params), memory_(memory) {
    const int64_t capacity = params.rows.capacity;
    if (selector() < C::kGroup) {
      RowBuffer& buffer = memory.shared.buffers[selector()];
      buffer.scores = memory.buffers + selector() * 2 * capacity;
      buffer.positions = reinterpret_cast<int32_t*>(buffer.scores + capacity);
      buffer.capacity = static_cast<uint32_t>(capacity);
    }
  }

  __device__ __forceinline__ void run() const {
    Shared<C>& shared = memory_.shared;
    const auto chunk = static_cast<uint32_t>(params_.rows.chunk);
    Turn group_turn{params_.groups};
    Turn chunk_turn{params_.chunks};
    for (int64_t g = last_group<C>(params_); g >= 0; g -= gridDim.x, group_turn.next()) {
      shared.group_full[group_turn.buffer].wait(group_turn.phase);
      const Group<C>& group = shared.groups[group_turn.buffer];
      clear();
      for (uint32_t begin = 0; begin < group.size; begin += chunk, chunk_turn.next()) {
        shared.chunk_full[chunk_turn.buffer].wait(chunk_turn.phase);
#pragma unroll 1
        for (int row = 0; row < C::kGroup; ++row)
          add(group.rows[row], row, begin, chunk_turn.buffer);
        publish_bars(chunk_turn.buffer, begin + params_.chunks * chunk < group.size);
        shared.chunk_empty[chunk_turn.buffer].arrive();
      }
#pragma unroll 1
      for (int row = 0; row < C::kGroup; ++row)
        if (group.rows[row].scored) write(group.rows[row].stage, shared.buffers[row]);
      finish_rows(params_, group);
      sync_selectors();
      shared.group_empty[group_turn.buffer].arrive();
    }
  }

 private:
  using Few = Held<4>;
  using Several = Held<12>;
  using Any = Stored;

  __device__ bool on_chip() const { return params_.rows.workspace == nullptr; }

  // Begin a group. It ends with a barrier.
  __device__ void clear() const {
    if (selector() < C::kGroup) {
      RowBuffer& buffer = memory_.shared.buffers[selector()];
      buffer.size = 0;
      buffer.bar = {};
    }
    sync_selectors();
  }

  // Take up a chunk of a row, which begins at key `begin` of the group. It ends with a barrier, if
  // the row has scores there.
  __device__ __forceinline__ void add(const GroupRow& row, int number, uint32_t begin,
                                      uint32_t chunk) const {
    const auto size = static_cast<uint32_t>(params_.rows.chunk);
    const uint32_t skipped = row.shift > begin ? row.shift - begin : 0;  // keys
    const uint32_t from = begin > row.shift ? begin - row.shift : 0;  // positions
    if (!row.scored || skipped >= size || from >= row.stage.source.size) return;
    const Chunk scores{memory_.chunk(chunk, number, size),
                       min(row.stage.source.size, begin + size - row.shift) - from,
                       static_cast<int32_t>(from)};
    RowBuffer& buffer = memory_.shared.buffers[number];
    if (!buffer.has_bar() && buffer.size + scores.n <= buffer.capacity)
      return add_all(buffer, scores);

    Counts& counts = memory_.shared.counts;
    uint32_t passing = scores.n;
    if (buffer.has_bar()) {
      const bool marked = !std::isnan(memory_.shared.bars[chunk][number]);
      const uint32_t key = selector() * 16;
      if (marked ? add_marked(counts, buffer, scores, key - skipped,
                              find_marks(chunk, number) & bits_before(skipped + scores.n, key),
                              passing)
                 : add_above(counts, buffer, scores, passing))
        return;
    }
    do {
      const uint32_t slack = (buffer.capacity - passing - row.stage.count) / 2;
      if (on_chip() && buffer.capacity <= Several::kMost)
        cut_buffer<Several>(counts, buffer, row.stage.count, slack);
      else
        cut_buffer<Any>(counts, buffer, row.stage.count, slack);
    } while (!add_above(counts, buffer, scores, passing));
  }

  // Bits for those of 16 keys from `key` on that lie before key `end`.
  __device__ static uint32_t bits_before(uint32_t end, uint32_t key) {
    return end <= key ? 0U : end - key >= 16 ? 0xffffU : (1U << (end - key)) - 1;
  }

  // Tell the scorers which bars the rows have, for their next chunk in this place; those of another
  // group have none yet.
  __device__ void publish_bars(uint32_t chunk, bool same_group) const {
    if (selector() < C::kGroup) {
      const RowBuffer& buffer = memory_.shared.buffers[selector()];
      memory_.shared.bars[chunk][selector()] = same_group ? buffer.passed() : NAN;
    }
  }

  // Of the 16 keys of this thread, which may be among the best of a row: see Own, Scorer::add_up().
  __device__ __forceinline__ uint32_t find_marks(uint32_t chunk, int row) const {
    constexpr int kOwn = Memory<C>::kMarkWords;
    const int64_t size = params_.rows.chunk;
    const uint32_t word = selector() * kOwn;
    if (word >= size / 16 * kOwn) return 0;
    const uint32_t* words = memory_.chunk_marks(chunk, size) + word;
    uint32_t bits[2];  // of keys g, and g + 8, in bit 4g
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int lane = C::kGroup == 1 ? 2 * half : kOwn == 1 ? 2 * row + half : row;
      bits[half] = words[kOwn == 1 ? 0 : half] >> lane & 0x11111111U;
      bits[half] = (bits[half] | bits[half] >> 3) & 0x03030303U;
      bits[half] = (bits[half] | bits[half] >> 6) & 0x000f000fU;
      bits[half] = (bits[half] | bits[half] >> 12) & 0xffU;
    }
    return bits[0] | bits[1] << 8;
  }

  // Write the row's best.
  __device__ __forceinline__ void write(const Stage& stage, const RowBuffer& buffer) const {
    Counts& counts = memory_.shared.counts;
    const uint32_t n = buffer.size;
    if (on_chip() && n <= Few::kMost)
      write_best<Few>(counts, stage, buffer.scores, buffer.positions, n, buffer.passed(), nullptr,
                      [] {});
    else if (on_chip() && n <= Several::kMost)
      write_best<Several>(counts, stage, buffer.scores, buffer.positions, n, buffer.passed(),
                          nullptr, [] {});
    else
      write_best<Any>(counts, stage, buffer.scores, buffer.positions, n, buffer.passed(), nullptr,
                      [] {});
  }

  const Params& params_;
  const Memory<C>& memory_;
};

}  // namespace hisa::cuda::sm90
