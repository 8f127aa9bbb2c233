// Finds the windows that an attention mask describes.
#pragma once

#include "../interrupt.h"
#include "../params.h"

namespace hisa::cpu {

// The larger of each.
MaskSummary larger(const MaskSummary& a, const MaskSummary& b);

// Write the windows of rows [begin, end) of all entries together, and summarise them.
MaskSummary scan_mask(const MaskParams& params, int64_t begin, int64_t end, InterruptPoll& poll);

}  // namespace hisa::cpu
