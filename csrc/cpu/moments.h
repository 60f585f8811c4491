// Mean and M2 of one channel in two plain passes: the kernel's differences make a NaN of an infinity, and may
// overflow where the mean does not; such a channel is rare and is done again here.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>

#include "kernels.h"

namespace resnet_fused::cpu {

template <class A>
void plain_moments_as(const void* data, int64_t rows, int64_t channels, double* mean, double* m2) {
  const A* values = static_cast<const A*>(data);
  double sum = 0;
  for (int64_t i = 0; i < rows; ++i) sum += static_cast<double>(values[i * channels]);
  *mean = sum / static_cast<double>(rows);
  *m2 = 0;
  for (int64_t i = 0; i < rows; ++i) {
    const double deviation = static_cast<double>(values[i * channels]) - *mean;
    *m2 += deviation * deviation;
  }
}

// `data` points at the channel in the first row; rows are `channels` elements apart.
inline void plain_moments(DType dtype, const void* data, int64_t rows, int64_t channels, double* mean, double* m2) {
  static constexpr void (*of[kDTypes])(const void*, int64_t, int64_t, double*, double*) = {
      plain_moments_as<float>, plain_moments_as<c10::BFloat16>, plain_moments_as<c10::Half>, plain_moments_as<double>};
  of[dtype](data, rows, channels, mean, m2);
}

} // namespace resnet_fused::cpu
