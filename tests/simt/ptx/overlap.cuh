#pragma once

namespace hisa::cuda::ptx {

inline void wait_for_previous_kernel() {}
inline void let_next_kernel_start() {}

}  // namespace hisa::cuda::ptx
