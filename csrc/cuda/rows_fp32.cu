#include "rows.cuh"

namespace hisa::cuda {

template <>
cudaError_t launch_rows_of<ElementType::kFloat32>(const RowsParams& params,
                                                  const Geometry& geometry, cudaStream_t stream) {
  return launch<FmaScorer, kBlocksPerMultiprocessor>(params, geometry, stream);
}

}  // namespace hisa::cuda
