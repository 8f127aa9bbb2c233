// Which kernels may run, of those that could: all, unless a test or a benchmark wants the others.
#pragma once

#include <atomic>

namespace hisa::cuda {

inline std::atomic<bool> use_hopper{true};  // those of sm90/, on Hopper
inline std::atomic<bool> use_split{true};   // those for few rows

}  // namespace hisa::cuda
