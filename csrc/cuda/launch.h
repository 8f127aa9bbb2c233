// How a call is launched on one device: which kernel, how many blocks, how much memory.
#pragma once

#include <cuda_runtime_api.h>

#include <string>

#include "../pages.h"
#include "../plan.h"
#include "limits.h"
#include "params.h"

namespace hisa::cuda {

struct Geometry {
  size_t variant;     // in kVariants; not used for fp32
  bool prunes;        // some rows may have more blocks than they keep
  int64_t grid;       // blocks
  int64_t kept, chunk, capacity;  // see RowsParams
  int64_t scorer_bytes;  // see RowsParams
  bool on_chip;       // a row's region is in shared memory, not in the workspace
  int64_t shared;     // bytes of shared memory of a block
  int64_t shared_limit;  // that one block can have
  int device;         // where it runs
  int64_t workspace;  // bytes of all blocks together
  bool splits;        // several blocks score a row, of which all candidates are in the workspace
  int64_t block_parts, token_parts;  // if so: how many blocks, in either stage
};

// `budgeted`: a row's candidates are one for each block, or the tokens of a budget that leaves some
// out, so that collecting their scores makes no tensor [rows, keys].
Geometry make_geometry(const Shape& shape, const DeviceLimits& limits, bool budgeted);
std::string kernel_name(const Shape& shape);

// Fill in what follows from the geometry, and launch. No synchronisation.
cudaError_t launch_rows(RowsParams params, const Geometry& geometry, char* workspace,
                        cudaStream_t stream);
cudaError_t launch_pool(const PoolParams& params, cudaStream_t stream);
cudaError_t launch_mask(const MaskParams& params, cudaStream_t stream);
cudaError_t launch_paged_pool(const PagedPoolParams& params, cudaStream_t stream);
cudaError_t launch_rope(const RopeParams& params, cudaStream_t stream);
cudaError_t launch_fold(const FoldParams& params, cudaStream_t stream);
cudaError_t launch_complete(const CompleteParams& params, cudaStream_t stream);

// One translation unit each: rows_fp8.cu, ...
template <ElementType kType>
cudaError_t launch_rows_of(const RowsParams& params, const Geometry& geometry, cudaStream_t stream);

}  // namespace hisa::cuda
