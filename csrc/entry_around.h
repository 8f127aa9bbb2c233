// The operators around an indexer, once for every device: see hisa/around.py.
//
// `Device` is as in entry.h, and provides mask(params), rope(params), fold(params),
// complete(params).
#pragma once

#include "entry.h"

namespace hisa {

using ThreeTensors = std::tuple<Tensor, Tensor, Tensor>;

template <class Device>
void mask_into(const MaskArguments& a, const Tensor& ks, const Tensor& ke, const Tensor& summary) {
  const Tensor& mask = a.mask;
  Device device(mask);

  // NOTE: memory that others made may not even be aligned to its elements. Only that is copied.
  const bool aligned = reinterpret_cast<intptr_t>(mask.const_data_ptr()) % mask.element_size() == 0;
  const Tensor values = aligned ? mask : mask.clone();
  device.mask({.data = values.const_data_ptr(),
               .entries = mask.size(0),
               .rows = mask.size(1),
               .keys = mask.size(2),
               .entry_stride = values.stride(0),
               .row_stride = values.stride(1),
               .key_stride = values.stride(2),
               .type = mask_type(mask),
               .start = ks.mutable_data_ptr<int32_t>(),
               .end = ke.mutable_data_ptr<int32_t>(),
               .summary = static_cast<MaskSummary*>(summary.mutable_data_ptr())});
}

template <class Device>
ThreeTensors mask_windows(const Tensor& mask) {
  const MaskArguments arguments{mask};
  check(arguments);
  const at::AutoDispatchBelowADInplaceOrView guard;
  const at::TensorOptions options = mask.options().dtype(at::kInt);
  const Tensor ks = at::empty({mask.size(0), mask.size(1)}, options);
  const Tensor ke = at::empty({mask.size(0), mask.size(1)}, options);
  const Tensor summary = at::empty({sizeof(MaskSummary) / sizeof(int32_t)}, options);
  mask_into<Device>(arguments, ks, ke, summary);
  return {ks, ke, summary};
}

template <class Device>
void mask_windows_out(const Tensor& mask, const Tensor& ks, const Tensor& ke,
                      const Tensor& summary) {
  write(MaskArguments{mask}, mask_into<Device>, ks, ke, summary);
}

template <class Device>
void rope_into(const RopeArguments& a, const Tensor& y, const OptionalTensor& scale) {
  Device device(a.x);
  const auto whole = [](const OptionalTensor& tensor) {
    return tensor.has_value() ? adjacent(tensor->contiguous(), Device::kAlignment) : Tensor();
  };
  const Tensor values = whole(a.x);
  const Tensor cosines = whole(a.cos);
  const Tensor sines = whole(a.sin);
  const bool turns = a.cos.has_value();
  if (a.x.numel() == 0) return;
  device.rope({.x = values.const_data_ptr(),
               .cos = turns ? cosines.const_data_ptr() : nullptr,
               .sin = turns ? sines.const_data_ptr() : nullptr,
               .entries = a.x.size(0),
               .rows = a.x.size(1),
               .heads = a.x.size(2),
               .dim = a.x.size(3),
               .angle_stride = turns && cosines.size(0) > 1 ? cosines.stride(0) : 0,
               .first = a.first,
               .turned = turns ? cosines.size(2) : 0,
               .interleaved = a.interleaved,
               .quantize = a.quantize,
               .power_of_two = a.power_of_two,
               .type = element_type(a.x.scalar_type()),
               .y = y.mutable_data_ptr(),
               .scale = a.quantize ? scale->mutable_data_ptr<float>() : nullptr});
}

template <class Device>
TwoTensors rope_quantize(const Tensor& x, const OptionalTensor& cos, const OptionalTensor& sin,
                         int64_t first, bool interleaved, bool quantize, bool power_of_two) {
  const RopeArguments arguments{x, cos, sin, first, interleaved, quantize, power_of_two};
  check(arguments);
  const at::AutoDispatchBelowADInplaceOrView guard;
  const auto sizes = x.sizes();
  const Tensor y = at::empty(sizes, quantize ? x.options().dtype(at::kFloat8_e4m3fn) : x.options());
  const Tensor scale =
      at::empty(quantize ? sizes.slice(0, 3) : at::IntArrayRef{0}, x.options().dtype(at::kFloat));
  rope_into<Device>(arguments, y, only_if(quantize, scale));
  return {y, scale};
}

template <class Device>
void rope_quantize_out(const Tensor& x, const OptionalTensor& cos, const OptionalTensor& sin,
                       int64_t first, bool interleaved, bool power_of_two, const Tensor& y,
                       const OptionalTensor& scale) {
  const bool quantize = scale.has_value();
  write(RopeArguments{x, cos, sin, first, interleaved, quantize, power_of_two}, rope_into<Device>,
        y, scale);
}

template <class Device>
Tensor fold_weights(const Tensor& weights, const OptionalTensor& scale, double factor) {
  check(FoldArguments{weights, scale});
  const at::AutoDispatchBelowADInplaceOrView guard;
  Device device(weights);
  const at::ScalarType dtype = weights.scalar_type();
  const bool reads = dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf;
  const Tensor values = (reads ? weights : weights.to(at::kFloat)).contiguous();
  const OptionalTensor scales = scale.has_value() ? OptionalTensor(scale->contiguous()) : scale;
  const Tensor folded = at::empty(weights.sizes(), weights.options().dtype(at::kFloat));
  if (weights.numel() == 0) return folded;
  device.fold({.weights = values.const_data_ptr(),
               .scale = data_or_null<float>(scales),
               .factor = static_cast<float>(factor),
               .count = values.numel(),
               .type = element_type(values.scalar_type()),
               .folded = folded.mutable_data_ptr<float>()});
  return folded;
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
  bump_version(indices);
}

}  // namespace hisa
