#pragma once

#include <cuda.h>

namespace hisa::cuda::sm90 {
inline constexpr ptrdiff_t kSharedBytes = 232448;  // of a block; peers' follow one another
inline constexpr uint32_t kMostEmulated = 4;  // peers
extern char start[];
}  // namespace hisa::cuda::sm90

namespace hisa::cuda::ptx {

inline uint32_t shared_address(const void* object) {
  return static_cast<uint32_t>(static_cast<const char*>(object) - sm90::start);
}
inline uint4 load_16(uint32_t address) {
  return *reinterpret_cast<const uint4*>(sm90::start + address);
}
template <class T>
void store(uint32_t address, T x) {
  std::memcpy(sm90::start + address, &x, sizeof x);
}
template <class T>
T load(uint32_t address) {
  T x;
  std::memcpy(&x, sm90::start + address, sizeof x);
  return x;
}
template <class T>
void store_if(bool wanted, uint32_t to, T x) {
  if (wanted) std::memcpy(sm90::start + to, &x, 4);
}
template <class T>
struct SharedArray {
  T* data;

  explicit SharedArray(const T* data) : data(const_cast<T*>(data)) {}
  T load(uint32_t i) const { return data[i]; }
  void load_4(uint32_t i, T (&x)[4]) const { std::memcpy(x, data + i, sizeof x); }
  void skip(uint32_t n) { data += n; }
  void push_4(uint32_t wanted, const T (&x)[4]) const {
    T* to = data;
    for (int j = 0; j < 4; ++j)
      if ((wanted >> j & 1) != 0) *to++ = x[j];
  }
};
inline void add(uint32_t address, uint32_t x) {
  *reinterpret_cast<uint32_t*>(sm90::start + address) += x;
}

}  // namespace hisa::cuda::ptx
