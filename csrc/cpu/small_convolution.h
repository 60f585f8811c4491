// A convolution of a small image as one matrix product over its patches: y[NPQ, K] = patches[NPQ, RSC] * w[K, RSC]^T.
//
// By the BLAS that torch ships, float32 and float64, one group. The rows of a 1x1 convolution are the image's own.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <array>
#include <cstring>

#include "host.h"

namespace resnet_fused::cpu {

using Pair = std::array<int64_t, 2>;

// The memory of `t` under other sizes and strides.
inline Tensor reinterpret(const Tensor& t, std::initializer_list<int64_t> sizes,
                          std::initializer_list<int64_t> strides) {
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(t.get(), static_cast<int64_t>(sizes.size()),
                                                               sizes.begin(), strides.begin(), t.storage_offset(),
                                                               &handle));
  return Tensor(handle);
}

class SmallConvolution {
 public:
  // `x` and `weight` are dense in channels_last.
  SmallConvolution(const Tensor& x, const Tensor& weight, const Pair& stride, const Pair& padding,
                   const Pair& dilation)
      : x_(x),
        weight_(weight),
        stride_(stride),
        padding_(padding),
        dilation_(dilation),
        N_(x.size(0)),
        C_(x.size(1)),
        H_(x.size(2)),
        W_(x.size(3)),
        K_(weight.size(0)),
        R_(weight.size(2)),
        S_(weight.size(3)),
        P_(output(H_, R_, 0)),
        Q_(output(W_, S_, 1)) {}

  Tensor forward() const {
    const Tensor y = empty_channels_last(N_, K_, P_, Q_, x_.scalar_type());
    multiply(reinterpret(y, {rows(), K_}, {K_, 1}), patches(),
             reinterpret(weight_, {columns(), K_}, {1, columns()}));
    return y;
  }

  Tensor backward_input(const Tensor& dy) const {
    const Tensor dx = empty_channels_last(N_, C_, H_, W_, x_.scalar_type());
    const Tensor w = reinterpret(weight_, {K_, columns()}, {columns(), 1});
    const Tensor g = reinterpret(dy, {rows(), K_}, {K_, 1});
    if (is_plain()) {
      multiply(reinterpret(dx, {rows(), C_}, {C_, 1}), g, w);
      return dx;
    }
    const Tensor dpatches = empty({rows(), columns()}, {columns(), 1}, x_.scalar_type());
    multiply(dpatches, g, w);
    x_.scalar_type() == ScalarType::Double ? scatter<double>(dpatches, dx) : scatter<float>(dpatches, dx);
    return dx;
  }

  // (K, C, R, S) in channels_last.
  Tensor backward_weight(const Tensor& dy) const {
    const Tensor dw = empty_channels_last(K_, C_, R_, S_, x_.scalar_type());
    multiply(reinterpret(dw, {K_, columns()}, {columns(), 1}), reinterpret(dy, {K_, rows()}, {1, K_}), patches());
    return dw;
  }

 private:
  int64_t output(int64_t size, int64_t taps, int d) const {
    return (size + 2 * padding_[d] - dilation_[d] * (taps - 1) - 1) / stride_[d] + 1;
  }
  int64_t rows() const { return N_ * P_ * Q_; }
  int64_t columns() const { return R_ * S_ * C_; }
  bool is_plain() const {
    return R_ == 1 && S_ == 1 && stride_[0] == 1 && stride_[1] == 1 && padding_[0] == 0 && padding_[1] == 0;
  }

  static void multiply(const Tensor& out, const Tensor& a, const Tensor& b) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()));
  }

  // Calls run(pixel of the patch, pixel of the image) in a fixed order; the latter is -1 in the padding.
  template <class Run>
  void for_each_tap(const Run& run) const {
    int64_t tap = 0;
    for (int64_t n = 0; n < N_; ++n) {
      for (int64_t p = 0; p < P_; ++p) {
        for (int64_t q = 0; q < Q_; ++q) {
          for (int64_t r = 0; r < R_; ++r) {
            const int64_t h = p * stride_[0] - padding_[0] + r * dilation_[0];
            for (int64_t s = 0; s < S_; ++s, ++tap) {
              const int64_t w = q * stride_[1] - padding_[1] + s * dilation_[1];
              const bool inside = h >= 0 && h < H_ && w >= 0 && w < W_;
              run(tap, inside ? (n * H_ + h) * W_ + w : -1);
            }
          }
        }
      }
    }
  }

  Tensor patches() const {
    if (is_plain()) return reinterpret(x_, {rows(), C_}, {C_, 1});
    const Tensor made = empty({rows(), columns()}, {columns(), 1}, x_.scalar_type());
    const int64_t bytes = C_ * static_cast<int64_t>(x_.element_size());
    char* out = static_cast<char*>(made.mutable_data_ptr());
    const char* in = static_cast<const char*>(x_.const_data_ptr());
    for_each_tap([&](int64_t tap, int64_t pixel) {
      pixel < 0 ? std::memset(out + tap * bytes, 0, bytes) : std::memcpy(out + tap * bytes, in + pixel * bytes, bytes);
    });
    return made;
  }

  template <class T>
  void scatter(const Tensor& dpatches, const Tensor& dx) const {
    T* out = static_cast<T*>(dx.mutable_data_ptr());
    const T* in = static_cast<const T*>(dpatches.const_data_ptr());
    std::fill_n(out, dx.numel(), T(0));
    for_each_tap([&](int64_t tap, int64_t pixel) {
      if (pixel < 0) return;
      for (int64_t c = 0; c < C_; ++c) out[pixel * C_ + c] += in[tap * C_ + c];
    });
  }

  const Tensor& x_;
  const Tensor weight_;
  const Pair &stride_, &padding_, &dilation_;
  int64_t N_, C_, H_, W_, K_, R_, S_, P_, Q_;
};

} // namespace resnet_fused::cpu
