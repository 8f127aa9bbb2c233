// A copy is done later, in any order; until then its place holds what was there before.
#pragma once

#include "mbarrier.cuh"

namespace hisa::cuda::ptx {

inline bool elect() { return threadIdx.x % 32 == 0; }

inline void copy_box(void* to, const CUtensorMap& map, Barrier& done, int32_t x, int32_t y = 0,
                     int32_t z = 0) {
  auto& block = simt::Block::current();
  if (x * map.element % 16 != 0) block.fail("a box that does not begin at a multiple of 16 bytes");
  if (shared_address(to) % 128 != 0) block.fail("a box into a place that is not aligned");
  block.later([to, &map, &done, x, y, z] {
    auto* out = static_cast<char*>(to);
    const int64_t at[3] = {x, y, z};
    const int64_t row = map.box[0] * map.element;
    for (int64_t c = 0; c < map.box[2]; ++c)
      for (int64_t b = 0; b < map.box[1]; ++b)
        for (int64_t a = 0; a < map.box[0]; ++a) {
          const int64_t i[3] = {at[0] + a, at[1] + b, at[2] + c};
          bool inside = true;
          for (int d = 0; d < 3; ++d) inside = inside && i[d] >= 0 && i[d] < map.size[d];
          char* place = out + (c * map.box[1] + b) * row + a * map.element;
          if (inside)
            std::memcpy(place,
                        map.data + i[0] * map.element + i[1] * map.stride[1] + i[2] * map.stride[2],
                        static_cast<size_t>(map.element));
          else
            std::memset(place, 0, static_cast<size_t>(map.element));
        }
    auto& phases = simt::Block::current().phases(&done);
    phases.bytes -= row * map.box[1] * map.box[2];
    simt::Block::current().complete_if(phases);
  });
}

}  // namespace hisa::cuda::ptx
