// The stages of one group of rows, in the order in which they run. Keys may lie in pages: `Params`
// is IndexParams or PagedIndexParams.
#pragma once

#include "group.h"

namespace hisa::cpu {

// Pool slots [begin, end).
void pool(const PoolParams& params, int64_t begin, int64_t end);
// Pool blocks [begin, end) of most_blocks() per sequence, its last ones first.
void pool(const PagedPoolParams& params, int64_t begin, int64_t end);
// Blocks that one sequence's new tokens complete, at most.
int64_t most_blocks(const PagedPoolParams& params);
// Choose the best of each row's inner blocks by the pooled keys.
template <class Params>
void coarse(const Params& params, Group& group);
// List each row's blocks: these and both ends, or all.
template <class Params>
void list_blocks(const Params& params, Group& group);
// Choose each row's tokens from its kept blocks.
template <class Params>
void refine(const Params& params, Group& group);
// Choose each row's tokens from its whole window.
void flat(const FlatParams& params, Group& group);
// Make physical places of what rows [begin, end) have selected.
void place(const PagedIndexParams& params, int64_t begin, int64_t end);

}  // namespace hisa::cpu
