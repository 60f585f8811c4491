// The batch norm primitives of registration.cpp as functions, for ops that are made of several of them.
#pragma once

#include <optional>
#include <tuple>

#include "../checks.h"

namespace resnet_fused::cpu {

Tensor bn_stats(const Tensor& y);

Tensor bn_finalize(const Tensor& partials, const OptionalTensor& weight, const OptionalTensor& bias,
                   const OptionalTensor& conv_bias, const OptionalTensor& running_mean,
                   const OptionalTensor& running_var, const OptionalTensor& num_batches_tracked,
                   std::optional<double> momentum, double eps);

Tensor bn_eval_moments(const Tensor& running_mean, const Tensor& running_var, const OptionalTensor& weight,
                       const OptionalTensor& bias, const OptionalTensor& conv_bias, double eps, ScalarType dtype);

Tensor bn_apply(const Tensor& y, const Tensor& moments, const OptionalTensor& residual,
                const OptionalTensor& residual_moments, int64_t residual_stride, int64_t channel_offset, bool relu);

// Of a dense y, in its own memory.
void bn_apply_in_place(const Tensor& y, const Tensor& moments, const OptionalTensor& residual, bool relu);

Tensor bn_bwd_reduce(const Tensor& dout, const Tensor& y, const Tensor& moments, bool relu);

std::tuple<Tensor, Tensor> bn_bwd_reduce_rebuild(const Tensor& dout, const Tensor& y, const Tensor& moments, bool relu);

std::tuple<Tensor, Tensor, Tensor> join_bwd_reduce(const Tensor& dout, const OptionalTensor& dskip,
                                                   const OptionalTensor& out, const Tensor& y, const Tensor& moments,
                                                   const OptionalTensor& residual_y,
                                                   const OptionalTensor& residual_moments);

Tensor bn_bwd_finalize(const Tensor& sums, const Tensor& moments, bool training);

Tensor bn_bwd_apply(const Tensor& g, const Tensor& y, const Tensor& moments, const Tensor& coef, bool relu);

} // namespace resnet_fused::cpu
