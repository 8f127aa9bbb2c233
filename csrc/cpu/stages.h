// The stages of one group of rows, in the order in which they run.
#pragma once

#include "group.h"

namespace hisa::cpu {

// Pool slots [begin, end).
void pool(const PoolParams& params, int64_t begin, int64_t end);
// Choose each row's blocks from the pooled keys.
void coarse(const IndexParams& params, Group& group);
// Choose each row's tokens from its kept blocks.
void refine(const IndexParams& params, Group& group);
// Choose each row's tokens from its whole window.
void flat(const FlatParams& params, Group& group);

}  // namespace hisa::cpu
