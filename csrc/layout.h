// Dense channels_last tensors, on any device.
#pragma once

#include <torch/csrc/stable/ops.h>

#include "checks.h"

namespace resnet_fused {

using torch::headeronly::MemoryFormat;

// Strides of dimensions of size 1 say nothing, so they are not looked at.
inline bool is_channels_last_dense(const Tensor& t) {
  int64_t expected = 1;
  for (const int64_t d : {1, 3, 2, 0}) {
    if (t.size(d) != 1 && t.stride(d) != expected) return false;
    expected *= t.size(d);
  }
  return true;
}

// `t` itself, or a copy laid out as the kernels need it.
inline Tensor dense(const Tensor& t) {
  if (t.numel() == 0 || is_channels_last_dense(t)) return t;
  return torch::stable::contiguous(t, MemoryFormat::ChannelsLast);
}
inline OptionalTensor dense(const OptionalTensor& t) { return t.has_value() ? OptionalTensor(dense(*t)) : t; }

inline Tensor contiguous_table(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

inline const void* data_of(const OptionalTensor& t) { return t.has_value() ? t->const_data_ptr() : nullptr; }

} // namespace resnet_fused
