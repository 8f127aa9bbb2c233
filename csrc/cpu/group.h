// A few consecutive query rows that one thread carries through coarse, refine and flat; or, where a
// call has fewer of these than threads, its part of their keys.
//
// Neighbouring rows look at mostly the same keys, so a tile of keys is converted to fp32 and
// transposed once per group, then scored for each row that wants it. No row's arithmetic depends on
// the others: grouping changes the speed, never the result.
#pragma once

#include <array>
#include <cstddef>

#include "../interrupt.h"
#include "../pages.h"
#include "kernels.h"
#include "select.h"

namespace hisa::cpu {

inline constexpr int64_t kGroupRows = 16;  // at most

// What a group's memory is made of, or that of a part of it.
struct GroupSizes {
  int64_t rows;  // of a group
  int64_t heads, dim;
  int64_t selector_keys;  // capacity of one selector
  int64_t blocks;  // kept blocks per row, 0 for flat

  int64_t bytes() const;
};

// Keys [begin, end) that a row wants scored; key `first` is the selector's position 0.
struct Span {
  int64_t begin = 0;
  int64_t end = 0;
  int64_t first = 0;
};
using Spans = std::array<Span, kGroupRows>;

// Which part of a group's keys, or blocks: the parts follow one another.
struct Part {
  int64_t number = 0;
  int64_t of = 1;

  Segment share(int64_t begin, int64_t end) const {
    const int64_t count = end - begin;
    return {begin + count * number / of, begin + count * (number + 1) / of};
  }
};

class Group {
 public:
  // Once `poll` says stop, scans end early and what is selected has no meaning.
  Group(const GroupSizes& sizes, std::byte* memory, InterruptPoll& poll);

  // Take up rows [first, first + count) of a call, whose keys may lie in pages.
  template <class Params>
  void begin(const Params& params, int64_t first, int64_t count);

  // Look at a part of the keys only, in what is to come.
  void take_part(Part part) { part_ = part; }
  const Part& part() const { return part_; }
  // Bring what later parts have selected together in this one.
  void join(Group& later);
  // Read the kept blocks of another part, which stays where it is.
  void share_blocks(const Group& first);

  int64_t count() const { return count_; }
  const Row& row(int64_t i) const { return rows_[static_cast<size_t>(i)]; }
  Selector& selector(int64_t i) { return selectors_[static_cast<size_t>(i)]; }
  // Kept blocks of row i, as their first tokens, ascending; coarse writes them, refine reads them.
  int64_t* blocks(int64_t i) { return blocks_ + i * sizes_.blocks; }
  int64_t& block_count(int64_t i) { return block_counts_[static_cast<size_t>(i)]; }

  // Empty row i's selector and have it choose `count`.
  void select(int64_t i, int64_t count);
  // Score keys [begin, end), at most kTileKeys, for the rows whose span meets them. Meanwhile the
  // keys `ahead` are fetched; worth it where they lie elsewhere.
  template <class AnyKeys>
  void scan_tile(const AnyKeys& keys, int64_t begin, int64_t end, const Spans& spans,
                 Segment ahead = {});
  // Score every row's whole span.
  template <class AnyKeys>
  void scan(const AnyKeys& keys, const Spans& spans);
  // Keep no more than what the selectors are to choose.
  void finish();
  // Write what they chose, and -1 and -inf behind it.
  void store(const Output& output);

 private:
  GroupSizes sizes_;
  const Kernels& kernels_;
  InterruptPoll& poll_;
  Queries queries_{};
  int64_t first_ = 0;
  int64_t count_ = 0;
  Part part_;
  bool loaded_ = false;  // query_ holds this group's queries
  std::array<Row, kGroupRows> rows_{};
  std::array<Selector, kGroupRows> selectors_{};
  std::array<int64_t, kGroupRows> block_counts_{};
  ElementType type_{};

  float* query_;  // [rows, heads, dim]
  float* packed_;  // [panels, dim, panel_keys]
  float* scores_;  // [kTileKeys]
  uint64_t* selector_keys_;  // [rows + 1, capacity], the last one to spare
  int64_t* blocks_;  // [rows, blocks]

  void load_queries();
};

}  // namespace hisa::cpu
