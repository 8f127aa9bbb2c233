#include "rows.cuh"

namespace hisa::cuda {

template cudaError_t launch_rows_of<ElementType::kBFloat16>(const RowsParams&, const Geometry&,
                                                            cudaStream_t);

}  // namespace hisa::cuda
