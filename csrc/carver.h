// Several tensors' memory in one piece.
#pragma once

#include <cstddef>
#include <cstdint>

namespace hisa {

// Hands out consecutive pieces of a buffer, each at a multiple of kAlignment bytes from its base;
// with a null base it only measures.
template <int64_t kAlignment>
class Carver {
 public:
  explicit Carver(std::byte* base) : base_(base) {}

  template <class T>
  T* take(int64_t n) {
    auto* piece = base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + used_);
    const int64_t bytes = n * static_cast<int64_t>(sizeof(T));
    used_ += (bytes + kAlignment - 1) / kAlignment * kAlignment;
    return piece;
  }
  int64_t used() const { return used_; }

 private:
  std::byte* base_;
  int64_t used_ = 0;
};

}  // namespace hisa
