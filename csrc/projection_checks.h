// What the projection ops of every device check, and the sizes that come of it.
#pragma once

#include <algorithm>
#include <vector>

#include "checks.h"

namespace resnet_fused {

struct ProjectionSizes {
  int64_t N, C, H, W, K, P, Q;
  int64_t stride[2];

  int64_t rows() const { return N * P * Q; }
  bool is_dense() const { return stride[0] == 1 && stride[1] == 1; } // every position is read
  int64_t tiles() const { return std::max<int64_t>(1, (rows() + 127) / 128); } // of 128 rows, for statistics
};

class ProjectionChecker : public Checker {
 public:
  using Checker::Checker;

  // x (N, C, H, W) and its image under a 1x1 convolution with K outputs.
  ProjectionSizes sizes(const char* argument, int64_t N, int64_t C, int64_t H, int64_t W, int64_t K,
                        const std::vector<int64_t>& stride) const {
    pair("stride", stride, 1);
    if (H < 1 || W < 1) require(false, argument, "H and W >= 1", shape_name({N, C, H, W}));
    const ProjectionSizes s{N, C, H, W, K, (H - 1) / stride[0] + 1, (W - 1) / stride[1] + 1, {stride[0], stride[1]}};
    constexpr int64_t kMost = (int64_t{1} << 31) - 128;
    require(std::max({N * H * W, C, K}) < kMost, argument, "N * H * W, C and K below 2^31 - 128",
            shape_name({N, C, H, W}));
    return s;
  }

  void weight(const Tensor& t, ScalarType expected, int64_t channels) const {
    device("weight", t);
    dtype("weight", t, expected);
    const bool fits = t.dim() == 4 && t.size(0) >= 1 && t.size(1) == channels && t.size(2) == 1 && t.size(3) == 1;
    if (!fits) {
      require(false, "weight", "shape (K, " + std::to_string(channels) + ", 1, 1)", "shape " + shape_name(t));
    }
  }

  void output(const char* argument, const OptionalTensor& t, const ProjectionSizes& s, ScalarType expected) const {
    if (!t.has_value()) return;
    device(argument, *t);
    dtype(argument, *t, expected);
    shape(argument, *t, {s.N, s.K, s.P, s.Q});
  }

  void optional_table(const char* argument, const OptionalTensor& t, int64_t rows, int64_t channels,
                      ScalarType expected) const {
    if (t.has_value()) table(argument, *t, rows, channels, opmath(expected));
  }

  // g, and what its prologue reads.
  void gradient(const Tensor& g, const OptionalTensor& y, const OptionalTensor& moments,
                const OptionalTensor& sums) const {
    activation("g", g);
    optional_table("moments", moments, 5, g.size(1), g.scalar_type());
    optional_table("sums", sums, 2, g.size(1), g.scalar_type());
    if (!sums.has_value()) return;
    require(moments.has_value(), "moments", "a table, which sums need", "None");
    require(y.has_value(), "y", "the stored output, which sums need", "None");
    like("y", y, g);
  }
};

inline ProjectionSizes check_projection_fwd(const ProjectionChecker& check, const Tensor& x, const Tensor& weight,
                                            const OptionalTensor& bias, const std::vector<int64_t>& stride,
                                            bool stats, const OptionalTensor& moments, const OptionalTensor& add,
                                            const OptionalTensor& add_moments, bool relu) {
  check.activation("x", x);
  check.weight(weight, x.scalar_type(), x.size(1));
  const auto s = check.sizes("x", x.size(0), x.size(1), x.size(2), x.size(3), weight.size(0), stride);
  check.vector("bias", bias, s.K);
  check.optional_table("moments", moments, 5, s.K, x.scalar_type());
  check.output("add", add, s, x.scalar_type());
  check.optional_table("add_moments", add_moments, 5, s.K, x.scalar_type());
  check.require(!add_moments.has_value() || add.has_value(), "add", "a tensor, which add_moments belong to", "None");
  const bool plain = !moments.has_value() && !add.has_value() && !relu;
  check.require(!stats || plain, "stats", "False with moments, add or relu", "True");
  return s;
}

inline ProjectionSizes check_projection_dgrad(const ProjectionChecker& check, const Tensor& g, const OptionalTensor& y,
                                              const Tensor& weight, const OptionalTensor& moments,
                                              const OptionalTensor& sums, const std::vector<int64_t>& size,
                                              const std::vector<int64_t>& stride, const OptionalTensor& add) {
  check.gradient(g, y, moments, sums);
  check.pair("size", size, 1);
  check.weight(weight, g.scalar_type(), weight.dim() == 4 ? weight.size(1) : 0);
  const auto s = check.sizes("size", g.size(0), weight.size(1), size[0], size[1], weight.size(0), stride);
  check.shape("g", g, {s.N, s.K, s.P, s.Q});
  if (add.has_value()) {
    check.device("add", *add);
    check.dtype("add", *add, g.scalar_type());
    check.shape("add", *add, {s.N, s.C, s.H, s.W});
  }
  return s;
}

inline ProjectionSizes check_projection_wgrad(const ProjectionChecker& check, const Tensor& g, const OptionalTensor& y,
                                              const Tensor& x, const OptionalTensor& moments,
                                              const OptionalTensor& sums, const std::vector<int64_t>& stride,
                                              ScalarType dtype) {
  check.gradient(g, y, moments, sums);
  check.activation("x", x);
  check.dtype("x", x, g.scalar_type());
  const auto s = check.sizes("x", x.size(0), x.size(1), x.size(2), x.size(3), g.size(1), stride);
  check.shape("g", g, {s.N, s.K, s.P, s.Q});
  if (dtype != x.scalar_type() && dtype != opmath(x.scalar_type())) {
    check.require(false, "dtype", "that of x, or float32", dtype_name(dtype));
  }
  return s;
}

} // namespace resnet_fused
