// How a call is launched on Hopper: two kernels, `coarse` and `refine`, or one, `flat`.
#pragma once

#include <cuda_runtime_api.h>

#include <string>

#include "../../pages.h"
#include "../../plan.h"
#include "../limits.h"
#include "params.h"

namespace hisa::cuda::sm90 {

#ifdef HISA_SM90
inline constexpr bool kCompiled = true;
#else
inline constexpr bool kCompiled = false;  // no call is taken
#endif

// One kernel's launch.
struct Plan {
  Work work;
  bool one_of_two;  // see Params
  int group;   // rows
  int groups, stages, chunks;  // see Params
  Boxes boxes;
  int64_t chunk, capacity;  // see RowsParams
  bool on_chip;             // the buffers are in shared memory, not in the workspace
  int64_t grid;       // blocks of threads
  int64_t shared;     // bytes of shared memory of a block
  int64_t shared_limit;  // that one block can have
  int device;         // where it runs
  int64_t workspace;  // bytes of all blocks together
};

struct Geometry {
  bool prunes;      // some rows may have more blocks than they keep; else it is `flat`
  int64_t kept;     // blocks of a row, at most
  Plan coarse;      // if it prunes
  Plan tokens;
  Plan other;       // row by row, if `tokens` is by pairs and one of two
  int64_t lists;    // bytes of the lists of kept blocks
  int64_t workspace;  // bytes
};

// What a kernel needs, whatever the call.
struct Needs {
  int64_t fixed;  // bytes of shared memory
  int stages;     // at least
  int step;       // which their number is a multiple of
  int span;       // tiles that a group has a multiple of
};

// Whether this family has a kernel for the call. It depends on nothing that may differ between
// calls for the same model, so that all of them are scored alike.
bool takes(const Shape& shape, const DeviceLimits& limits);
std::string kernel_name(const Shape& shape);
Geometry make_geometry(const Shape& shape, const DeviceLimits& limits);

// Of a paged call on some sequences; shape.keys are those of one.
Geometry make_paged_geometry(const Shape& shape, const DeviceLimits& limits, int64_t sequences,
                             int64_t page_size);

// Fill in what follows from the geometry, and launch. No synchronisation.
cudaError_t launch_rows(RowsParams params, const Geometry& geometry, char* workspace,
                        cudaStream_t stream);

// Likewise of a paged call, whose keys `params` numbers as PageMap does; its pooled keys, adjacent.
cudaError_t launch_paged_rows(RowsParams params, const PagedKeys& keys, const Geometry& geometry,
                              char* workspace, cudaStream_t stream);

// One translation unit each: rows_fp8.cu, rows_bf16.cu.
template <ElementType kType>
cudaError_t launch_kernel(const Params& params, const Plan& plan, cudaStream_t stream);
template <ElementType kType>
Needs find_needs(int64_t heads, int64_t dim, Work work);

}  // namespace hisa::cuda::sm90
