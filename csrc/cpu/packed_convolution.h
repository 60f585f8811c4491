// A convolution of float32 or bfloat16 as our own matrix product (gemm.h): the batch norm, the ReLU and the gradient's affine are
// applied while it packs, statistics, masks and reductions are made while it stores.
#pragma once

#include <optional>
#include <tuple>

#include "packed_product.h"
#include "pass.h"
#include "small_convolution.h"

namespace resnet_fused::cpu {

// Per-channel constants of one image, in whole vectors of float.
class ImageConstants {
 public:
  ImageConstants(int64_t channels, const Kernels& isa) {
    const int64_t lanes = isa.vector_bytes / 4;
    plane_ = (channels + lanes - 1) / lanes * lanes;
    values_.resize(kPlanes * plane_ + lanes); // a vector may begin at any channel
  }
  void fill(int first, const Tensor& table, std::initializer_list<int> rows) {
    const Tensor dense_table = contiguous_table(table);
    const Table in(dense_table);
    for (const int row : rows) {
      for (int64_t c = 0; c < in.channels(); ++c) values_[first * plane_ + c] = static_cast<float>(in.get(row, c));
      ++first;
    }
  }
  void attach(BnArgs& args) const {
    args.constants = values_.data();
    args.plane = plane_;
  }
  int64_t plane() const { return plane_; }

 private:
  int64_t plane_;
  std::vector<float> values_;
};

// An activation that a convolution reads: plain, or with the batch norm and the ReLU to apply first.
struct PackedImage {
  const Tensor& y;
  const OptionalTensor& moments;
  bool relu;

  void attach(BnArgs& args, int& kind, ImageConstants& constants) const {
    args.y = y.const_data_ptr();
    args.relu = relu;
    kind = moments.has_value() ? kNormalised : kRaw;
    if (moments.has_value()) constants.fill(kMean, *moments, {0, 2, 3});
    constants.attach(args);
  }
};

// A gradient that a convolution reads: of y, from the one of what follows its batch norm.
struct PackedGradient {
  const Tensor &g, &y, &moments, &coef;
  bool relu;

  void attach(BnArgs& args, int& kind, ImageConstants& constants) const {
    args.grad = g.const_data_ptr();
    args.y = y.const_data_ptr();
    args.relu = relu;
    args.training = coef.size(0) == 3;
    kind = kGradient;
    constants.fill(kMean, moments, {0, 2, 3});
    args.training ? constants.fill(kSecond, coef, {0, 1, 2}) : constants.fill(kSecond, coef, {0});
    constants.attach(args);
  }
};

// What dgrad does with the gradient of an image: adds `skip`, masks, and reduces for the batch norm before.
struct PackedBack {
  OptionalTensor skip, out, y, moments, residual, residual_moments;
  bool relu = false;
};

struct PackedBackGrads {
  Tensor g;
  OptionalTensor sums, residual_sums;
};

class PackedConvolution {
 public:
  // Of dense tensors; `weight` is (K, C, R, S). `winograd`: where it is faster, forward and dgrad take it.
  PackedConvolution(const Tensor& x, const Tensor& weight, const Pair& stride,
                    const Pair& padding, bool winograd);

  // Refuses what is not shaped as the convolution's output.
  void check_output(const Checker& check, const char* argument, const OptionalTensor& t) const;

  // y, and partial statistics (T, 3, K) where they are wanted.
  std::tuple<Tensor, OptionalTensor> forward(const PackedImage& image, bool stats) const;
  // act(bn(y) + residual), with running statistics.
  Tensor infer(const Tensor& x, const Tensor& moments, const OptionalTensor& residual, bool relu) const;
  PackedBackGrads backward_image(const PackedGradient& dy, const PackedBack& back) const;
  // (K, C, R, S) in channels_last.
  Tensor backward_weight(const PackedGradient& dy, const PackedImage& image) const;

 private:
  ConvArgs forward_args() const;
  // y, and the rows of a tile of its statistics.
  std::tuple<Tensor, int64_t> run_forward(const PackedImage& image, const ProjectionCall& store) const;
  void dgrad_class(ConvArgs& args, int64_t a, int64_t b, std::vector<std::vector<double>>& sums) const;

  Products own_;
  ScalarType dtype_;
  bool winograd_;
  Tensor weight_;
  Pair stride_, padding_;
  int64_t N_, C_, H_, W_, K_, R_, S_, P_, Q_;
};

} // namespace resnet_fused::cpu
