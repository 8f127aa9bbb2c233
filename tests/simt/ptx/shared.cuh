#pragma once

#include <cuda.h>

namespace hisa::cuda::sm90 {
extern char start[];
}

namespace hisa::cuda::ptx {

inline uint32_t shared_address(const void* object) {
  return static_cast<uint32_t>(static_cast<const char*>(object) - sm90::start);
}
template <class T>
void store_if(bool wanted, T* to, T x) {
  if (wanted) *to = x;
}
inline void store_if(bool wanted, uint32_t to, float x) {
  if (wanted) std::memcpy(sm90::start + to, &x, 4);
}
inline void add(uint32_t address, uint32_t x) {
  *reinterpret_cast<uint32_t*>(sm90::start + address) += x;
}

}  // namespace hisa::cuda::ptx
