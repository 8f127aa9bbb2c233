// How a paged call becomes one on adjacent keys, so that rows of both are scored and selected by
// the same kernels, to the same bits.
//
// On Hopper few rows are split, without any of this: see sm90/split.h. Many rows, whose pages the
// copy engine finds:
//   gather_pooled   the pooled keys of each sequence's blocks, side by side; windows
//   coarse, refine  of sm90/
//   place           from positions to places in pages, if those are wanted
//
// Elsewhere, as two flat calls over keys that are first gathered from their pages:
//   gather_pooled   likewise; which of them a row chooses among
//   flat            of these, the best block_topk - 2
//   gather_tokens   the keys of each row's kept blocks, side by side
//   flat            of these, the best topk
//   place           from places among the gathered keys to positions, or to places in pages
//
// As many sequences at a time as kGathered has room for, at least one.
#pragma once

#include <cuda_runtime_api.h>

#include "../pages.h"
#include "params.h"

namespace hisa::cuda {

inline constexpr int64_t kGathered = int64_t{256} << 20;  // bytes

// Sequences [first, first + count) of a call, and their memory.
struct PagedPart {
  PagedIndexParams call;
  int64_t first, count;  // sequences
  bool direct;           // keys are read where they lie
  int64_t kept;          // blocks of a row, at most

  char* pooled;          // [count, room / block_size, dim]
  float* pooled_scale;   // [count, room / block_size]

  // Direct: sequence i of the part has room from token i * room on.
  int32_t *row_start, *row_end;  // [rows], windows
  int32_t* edges;                // [count + 1], first tokens of sequences

  // Else, of what is gathered:
  char* keys;            // [rows, kept, block_size, dim]
  float* scale;          // [rows, kept, block_size], null if keys have none
  int32_t* lengths;      // [count]
  int32_t* chosen;       // [rows, kept - 2] of the blocks, from the second on
  int32_t* blocks;       // [rows, kept] that are kept, ascending
  // Of each row, among the pooled keys and among the tokens' keys.
  int32_t *block_start, *block_end, *token_start, *token_end;  // [rows]

  HISA_HOST_DEVICE int64_t rows() const { return count * call.windows.next_n; }
  HISA_HOST_DEVICE int64_t first_row() const { return first * call.windows.next_n; }
  HISA_HOST_DEVICE int64_t slots() const { return call.pooled.room; }  // of a sequence
  HISA_HOST_DEVICE bool prunes() const { return slots() > call.block_topk; }
};

struct PagedSizes {
  int64_t sequences;  // taken at a time
  int64_t workspace;  // bytes
};
PagedSizes size_paged(const PagedIndexParams& call, bool direct);
// The part that begins with sequence `first`, in a workspace of that size.
PagedPart make_part(const PagedIndexParams& call, bool direct, int64_t first, char* workspace);

// The call on adjacent keys, but for the tokens' keys, which are in these pages.
RowsParams direct_rows(const PagedPart& part);
PagedKeys keys_of(const PagedPart& part);
// The flat calls.
RowsParams choose_blocks(const PagedPart& part);
RowsParams choose_tokens(const PagedPart& part);

cudaError_t gather_pooled(const PagedPart& part, cudaStream_t stream);
cudaError_t gather_tokens(const PagedPart& part, cudaStream_t stream);
cudaError_t place(const PagedPart& part, cudaStream_t stream);

}  // namespace hisa::cuda
