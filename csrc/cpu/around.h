// Queries or keys on their way from a projection to the indexer.
#pragma once

#include "../params.h"

namespace hisa::cpu {

// Turn and quantise the heads of rows [begin, end) of all entries together.
void rope(const RopeParams& params, int64_t begin, int64_t end);

// Fold weights [begin, end).
void fold(const FoldParams& params, int64_t begin, int64_t end);

// Fill and shift rows [begin, end) of a selection.
void complete(const CompleteParams& params, int64_t begin, int64_t end);

}  // namespace hisa::cpu
