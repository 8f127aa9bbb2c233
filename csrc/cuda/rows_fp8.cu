#include "rows.cuh"

namespace hisa::cuda {

template cudaError_t launch_rows_of<ElementType::kFloat8E4M3>(const RowsParams&, const Geometry&,
                                                              cudaStream_t);

}  // namespace hisa::cuda
