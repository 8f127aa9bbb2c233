// What the library accepts. The one list that checks, error texts, build_info() and tests read.
#pragma once

#include <array>
#include <cstdint>

namespace hisa::support {

inline constexpr std::array<int64_t, 6> kBlockSizes = {8, 16, 32, 64, 128, 256};
inline constexpr std::array<int64_t, 5> kPageSizes = {16, 32, 64, 128, 256};
inline constexpr int64_t kPageAlignment = 16;  // bytes: of pages and of pooled keys beside them
inline constexpr int64_t kMaxHeads = 128;  // H in 1..128
inline constexpr int64_t kDimStep = 16;  // D a multiple of 16 ...
inline constexpr int64_t kMaxDim = 256;  // ... up to 256
inline constexpr int64_t kMinBlockTopk = 2;  // the first and the last block are always kept
inline constexpr int64_t kMaxKeys = 2147483647;  // indices are int32
inline constexpr int64_t kMaxRows = 2147483647;  // of a plan, so that its counts fit in 64 bits
inline constexpr int64_t kTurnedStep = 8;        // channels turned by RoPE, and where they begin
// dtypes of q and k: see element_type() in checks.cpp, which the same text names.
inline constexpr const char* kElementTypes = "float32, bfloat16, float16 or float8_e4m3fn";
// of pages: see page_type() in checks_paged.cpp
inline constexpr const char* kPageTypes =
    "uint8 (float8_e4m3fn keys, then their scales), float32, bfloat16 or float16";
// of a mask: see mask_type() in checks.cpp
inline constexpr const char* kMaskTypes = "bool, float16, bfloat16, float32 or float64";
inline constexpr const char* kPoolings = "\"mean\" or \"max\"";

}  // namespace hisa::support
