// A copy is done some time later. A thread waits for its own.
#pragma once

#include <cuda.h>

#include <vector>

#include "shared.cuh"

namespace hisa::cuda::ptx {

// Copies under way of each group of a thread; the last one is still open.
inline std::vector<std::shared_ptr<int>>& copies() {
  static std::map<std::pair<const void*, uint32_t>, std::vector<std::shared_ptr<int>>> all;
  auto& block = simt::Block::current();
  auto& mine = all[{&block, block.thread().index}];
  if (mine.empty()) mine.push_back(std::make_shared<int>(0));
  return mine;
}

inline void copy_later(uint32_t shared, const void* global, size_t bytes, bool real) {
  std::shared_ptr<int> group = copies().back();
  ++*group;
  simt::Block::current().later([=] {
    char* to = sm90::start + shared;
    if (real)
      std::memcpy(to, global, bytes);
    else
      std::memset(to, 0, bytes);
    --*group;
  });
}
inline void copy_16(uint32_t shared, const void* global, bool real) {
  copy_later(shared, global, 16, real);
}
inline void copy_4(uint32_t shared, const void* global) { copy_later(shared, global, 4, true); }
inline void commit_copies() { copies().push_back(std::make_shared<int>(0)); }
template <int pending>
void wait_for_copies() {
  auto& mine = copies();
  simt::Block::current().wait([&mine] {
    for (size_t i = 0; i + 1 + pending < mine.size(); ++i)
      if (*mine[i] > 0) return false;
    return true;
  });
  mine.erase(mine.begin(), mine.end() - std::min<ptrdiff_t>(mine.size(), pending + 1));
}

}  // namespace hisa::cuda::ptx
