// The operators around an indexer, once for every device: see hisa/around.py.
//
// `Device` is as in entry.h, and provides mask(params), rope(params), complete(params).
#pragma once

#include "entry.h"

namespace hisa {

using ThreeTensors = std::tuple<Tensor, Tensor, Tensor>;

template <class Device>
ThreeTensors mask_windows(const Tensor& mask) {
  check(MaskArguments{mask});
  const at::AutoDispatchBelowADInplaceOrView guard;
  Device device(mask);

  // NOTE: memory that others made may not even be aligned to its elements. Only that is copied.
  const bool aligned = reinterpret_cast<intptr_t>(mask.const_data_ptr()) % mask.element_size() == 0;
  const Tensor values = aligned ? mask : mask.clone();
  const at::TensorOptions options = mask.options().dtype(at::kInt);
  ThreeTensors output{at::empty({mask.size(0), mask.size(1)}, options),
                      at::empty({mask.size(0), mask.size(1)}, options),
                      at::empty({sizeof(MaskSummary) / sizeof(int32_t)}, options)};
  auto& [start, end, summary] = output;
  device.mask({.data = values.const_data_ptr(),
               .entries = mask.size(0),
               .rows = mask.size(1),
               .keys = mask.size(2),
               .entry_stride = values.stride(0),
               .row_stride = values.stride(1),
               .key_stride = values.stride(2),
               .type = mask_type(mask),
               .start = start.template mutable_data_ptr<int32_t>(),
               .end = end.template mutable_data_ptr<int32_t>(),
               .summary = static_cast<MaskSummary*>(summary.mutable_data_ptr())});
  return output;
}

template <class Device>
TwoTensors rope_quantize(const Tensor& x, const OptionalTensor& cos, const OptionalTensor& sin,
                         int64_t first, bool interleaved, bool quantize, bool power_of_two) {
  check(RopeArguments{x, cos, sin, first, quantize});
  const at::AutoDispatchBelowADInplaceOrView guard;
  Device device(x);

  const auto whole = [](const OptionalTensor& tensor) {
    return tensor.has_value() ? adjacent(tensor->contiguous(), Device::kAlignment) : Tensor();
  };
  const Tensor values = whole(x);
  const Tensor cosines = whole(cos);
  const Tensor sines = whole(sin);
  const bool turns = cos.has_value();
  const auto sizes = x.sizes();
  TwoTensors output{
      at::empty(sizes, quantize ? x.options().dtype(at::kFloat8_e4m3fn) : x.options()),
      at::empty(quantize ? sizes.slice(0, 3) : at::IntArrayRef{0}, x.options().dtype(at::kFloat))};
  auto& [y, scale] = output;
  if (x.numel() == 0) return output;
  device.rope({.x = values.const_data_ptr(),
               .cos = turns ? cosines.const_data_ptr() : nullptr,
               .sin = turns ? sines.const_data_ptr() : nullptr,
               .entries = x.size(0),
               .rows = x.size(1),
               .heads = x.size(2),
               .dim = x.size(3),
               .angle_stride = turns && cosines.size(0) > 1 ? cosines.stride(0) : 0,
               .first = first,
               .turned = turns ? cosines.size(2) : 0,
               .interleaved = interleaved,
               .quantize = quantize,
               .power_of_two = power_of_two,
               .type = element_type(x.scalar_type()),
               .y = y.mutable_data_ptr(),
               .scale = quantize ? scale.template mutable_data_ptr<float>() : nullptr});
  return output;
}

template <class Device>
void complete(const Tensor& indices, const Tensor& ks, const Tensor& ke, int64_t keys) {
  check(CompleteArguments{indices, ks, ke, keys});
  const at::AutoDispatchBelowADInplaceOrView guard;
  Device device(indices);
  const Tensor start = adjacent(ks);
  const Tensor end = adjacent(ke);
  if (indices.numel() == 0) return;
  device.complete({.indices = indices.mutable_data_ptr<int32_t>(),
                   .start = start.const_data_ptr<int32_t>(),
                   .end = end.const_data_ptr<int32_t>(),
                   .rows = indices.size(0),
                   .topk = indices.size(1),
                   .keys = keys});
  if (!indices.is_inference()) indices.unsafeGetTensorImpl()->bump_version();
}

}  // namespace hisa
