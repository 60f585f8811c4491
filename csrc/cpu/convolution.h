// PyTorch's own convolution, forward and backward, with outputs that are exactly channels_last.
//
// A small one is a matrix product over patches instead: there the library's set-up costs more than its arithmetic.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/device.h>

#include <tuple>

#include "host.h"
#include "packed_convolution.h"
#include "small_convolution.h"

namespace resnet_fused::cpu {

// Multiplications below which a call's fixed cost outweighs what it computes.
constexpr int64_t kSmallProduct = 1 << 19;

// Nothing that runs inside an op is recorded: the op is a step of an autograd node.
class NoGrad {
 public:
  NoGrad() : before_(aoti_torch_grad_mode_is_enabled()) { aoti_torch_grad_mode_set_enabled(false); }
  ~NoGrad() { aoti_torch_grad_mode_set_enabled(before_); }
  NoGrad(const NoGrad&) = delete;
  NoGrad& operator=(const NoGrad&) = delete;

 private:
  bool before_;
};

// `t` with the strides of a channels_last tensor, also where a dimension of size 1 leaves them open.
inline Tensor exactly_channels_last(const Tensor& t) {
  const Tensor laid = t.numel() == 0 ? t : dense(t);
  const int64_t c = laid.size(1), h = laid.size(2), w = laid.size(3);
  const int64_t strides[4] = {h * w * c, 1, w * c, c};
  if (std::equal(strides, strides + 4, laid.strides().begin())) return laid;
  return reinterpret(laid, {laid.size(0), c, h, w}, {h * w * c, 1, w * c, c});
}

inline Tensor as_dtype(const Tensor& t, ScalarType dtype) {
  return t.scalar_type() == dtype ? t : torch::stable::to(t, dtype);
}

// The gradient of a parameter in its dtype and exact strides, as DDP's buckets and optimizers expect.
inline Tensor like_parameter(const Tensor& grad, const Tensor& weight) {
  const auto strides = grad.strides(), expected = weight.strides();
  if (grad.scalar_type() == weight.scalar_type()) {
    if (std::equal(strides.begin(), strides.end(), expected.begin())) return grad;
    // The filters of a 1x1 convolution lie the same under several strides.
    const int64_t K = grad.size(0), C = grad.size(1);
    const bool rows = grad.numel() == K * C && grad.stride(0) == C && grad.stride(1) == 1;
    if (rows && weight.stride(0) == C && weight.stride(1) == 1) {
      return reinterpret(grad, {K, C, 1, 1}, {C, 1, weight.stride(2), weight.stride(3)});
    }
  }
  Tensor out = torch::stable::empty_like(weight);
  torch::stable::copy_(out, grad);
  return out;
}

struct Convolution {
  Pair stride, padding, dilation;
  int64_t groups;

  void check(const Checker& check, const Tensor& x, const Tensor& weight) const {
    check.activation("src", x);
    check.device("weight", weight);
    const ScalarType dtype = weight.scalar_type();
    if (!is_float(dtype)) check.require(false, "weight", "a float dtype", dtype_name(dtype));
    if (weight.dim() != 4) check.require(false, "weight", "shape (K, C / groups, R, S)", "shape " + shape_name(weight));
    check.require(groups >= 1, "groups", "an integer >= 1", groups);
    check.require(weight.size(1) * groups == x.size(1), "weight", "C / groups input channels", weight.size(1));
    for (int d = 0; d < 2; ++d) {
      check.require(stride[d] >= 1 && padding[d] >= 0 && dilation[d] >= 1, "stride, padding, dilation",
                    "at least 1, 0 and 1", "less");
      const int64_t spare = x.size(2 + d) + 2 * padding[d] - dilation[d] * (weight.size(2 + d) - 1) - 1;
      if (spare < 0) check.require(false, "src", "an image no smaller than the filter", "shape " + shape_name(x));
    }
  }

  Tensor forward(const Tensor& x, const Tensor& weight_any) const {
    const Tensor weight = as_dtype(weight_any, x.scalar_type());
    if (is_small_product(x, weight)) return SmallConvolution(x, dense(weight), stride, padding, dilation).forward();
    static constexpr int64_t zeros[2] = {0, 0};
    AtenTensorHandle y = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_convolution(x.get(), weight.get(), nullptr, stride.data(), 2,
                                                             padding.data(), 2, dilation.data(), 2, 0, zeros, 2,
                                                             groups, &y));
    return exactly_channels_last(Tensor(y));
  }

  // (dx, dweight), each if wanted; dweight in the dtype and strides of `weight_any`.
  std::tuple<OptionalTensor, OptionalTensor> backward(const Tensor& dy, const Tensor& x, const Tensor& weight_any,
                                                      bool need_x, bool need_weight) const {
    const Tensor weight = as_dtype(weight_any, dy.scalar_type());
    if (is_small_product(x, weight)) {
      const SmallConvolution small(x, dense(weight), stride, padding, dilation);
      const Tensor dense_dy = dense(dy);
      OptionalTensor dx, dweight;
      if (need_x) dx = small.backward_input(dense_dy);
      if (need_weight) dweight = like_parameter(small.backward_weight(dense_dy), weight_any);
      return {dx, dweight};
    }
    static constexpr int64_t zeros[2] = {0, 0};
    const int32_t mask[3] = {need_x, need_weight, 0};
    AtenTensorHandle made[3] = {nullptr, nullptr, nullptr};
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_convolution_backward(
        dy.get(), x.get(), weight.get(), nullptr, 0, stride.data(), 2, padding.data(), 2, dilation.data(), 2, 0, zeros,
        2, groups, mask, 3, &made[0], &made[1], &made[2]));
    const OptionalTensor dx = owned(made[0]), dweight = owned(made[1]);
    owned(made[2]);
    return {need_x ? OptionalTensor(exactly_channels_last(*dx)) : std::nullopt,
            need_weight ? OptionalTensor(like_parameter(*dweight, weight_any)) : std::nullopt};
  }

  // Whether our own matrix products can compute it: their dtype, one group, no dilation, and nothing that they step over.
  bool can_pack(const Tensor& x, const Tensor& weight) const {
    const bool steps_over = weight.size(2) < stride[0] || weight.size(3) < stride[1];
    return kernels().convolution[dtype_of(x)].element > 0 && groups == 1 && dilation[0] == 1 && dilation[1] == 1 && !steps_over &&
        x.numel() > 0 && !is_small(x, weight);
  }

  PackedConvolution packed(const Tensor& x, const Tensor& weight, bool winograd) const {
    return PackedConvolution(x, as_dtype(weight, x.scalar_type()), stride, padding, winograd);
  }

  bool is_small(const Tensor& x, const Tensor& weight) const {
    return x.numel() * weight.size(0) / groups * (weight.size(2) * weight.size(3)) <= kSmallProduct;
  }

 private:
  static OptionalTensor owned(AtenTensorHandle handle) {
    return handle == nullptr ? OptionalTensor() : OptionalTensor(Tensor(handle));
  }

  bool is_small_product(const Tensor& x, const Tensor& weight) const {
    const ScalarType dtype = x.scalar_type();
    return groups == 1 && (dtype == ScalarType::Float || dtype == ScalarType::Double) && x.numel() > 0 &&
        is_small(x, weight) && is_channels_last_dense(x);
  }
};

} // namespace resnet_fused::cpu
