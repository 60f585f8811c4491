// Max pool of act(z) and its backward, on the CPU.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "host.h"

namespace resnet_fused::cpu {
namespace {

using Pair = std::vector<int64_t>;

int64_t pooled_size(int64_t size, int64_t kernel, int64_t stride, int64_t padding) {
  return (size + 2 * padding - kernel) / stride + 1;
}

// The checked arguments that both directions share.
PoolArgs pool_args(const Checker& check, const Tensor& y, const Tensor& moments, const Pair& kernel,
                   const Pair& stride, const Pair& padding, bool relu) {
  check.activation("y", y);
  check.table("moments", moments, 5, y.size(1), opmath(y.scalar_type()));
  check.pair("kernel", kernel, 1);
  check.pair("stride", stride, 1);
  check.pair("padding", padding, 0);
  PoolArgs args;
  args.channels = y.size(1);
  args.relu = relu;
  for (int axis = 0; axis < 2; ++axis) {
    check.require(2 * padding[axis] <= kernel[axis], "padding", "at most half of kernel", padding[axis]);
    args.in[axis] = y.size(2 + axis);
    args.kernel[axis] = kernel[axis];
    args.stride[axis] = stride[axis];
    args.padding[axis] = padding[axis];
    check.require(args.in[axis] + 2 * padding[axis] >= kernel[axis], "y", "a padded size that holds the kernel",
                  "shape " + shape_name(y));
    args.pooled[axis] = pooled_size(args.in[axis], kernel[axis], stride[axis], padding[axis]);
  }
  args.slots = (kernel[0] + stride[0] - 1) / stride[0];
  return args;
}

// The affine of one pixel's channels.
struct Pixel {
  Tiling tiling;
  Constants constants;

  Pixel(const Tensor& y, const Tensor& moments)
      : tiling(Tiling::of_pixel(y, kernels())), constants(tiling, y.scalar_type() == ScalarType::Double) {
    constants.fill_affine(kMean, moments);
  }
};

Tensor pool_apply(const Tensor& y_any, const Tensor& moments, const Pair& kernel, const Pair& stride,
                  const Pair& padding, bool relu) {
  PoolArgs args = pool_args(Checker("pool_apply"), y_any, moments, kernel, stride, padding, relu);
  const Tensor y = dense(y_any);
  const Tensor out = empty_channels_last(y.size(0), args.channels, args.pooled[0], args.pooled[1], y.scalar_type());
  const Pixel pixel(y, moments);
  args.y = y.const_data_ptr();
  args.result = out.mutable_data_ptr();
  args.constants = pixel.constants.data();
  args.plane = pixel.tiling.plane;
  const PoolKernel fn = kernels().pool_apply[dtype_of(y)];
  const int64_t rows = y.size(0) * args.pooled[0];
  for_parts(parts_of(rows, y.numel()), rows, [&](int64_t, int64_t begin, int64_t end) { fn(args, begin, end); });
  return out;
}

std::tuple<Tensor, Tensor> pool_bwd(const Tensor& dout_any, const Tensor& y_any, const Tensor& moments,
                                    const Pair& kernel, const Pair& stride, const Pair& padding, bool relu) {
  const Checker check("pool_bwd");
  PoolArgs args = pool_args(check, y_any, moments, kernel, stride, padding, relu);
  check.device("dout", dout_any);
  check.dtype("dout", dout_any, y_any.scalar_type());
  check.shape("dout", dout_any, {y_any.size(0), args.channels, args.pooled[0], args.pooled[1]});
  const Tensor y = dense(y_any), dout = dense(dout_any);
  const Tensor g = empty_channels_last_like(y);
  const Pixel pixel(y, moments);
  const int64_t plane = pixel.tiling.plane, rows = y.size(0) * args.in[0];
  args.y = y.const_data_ptr();
  args.grad = dout.const_data_ptr();
  args.result = g.mutable_data_ptr();
  args.constants = pixel.constants.data();
  args.plane = plane;
  const PoolBwdKernel fn = kernels().pool_bwd[dtype_of(y)];
  const int64_t parts = parts_of(rows, y.numel());
  const int64_t opmath_bytes = y.scalar_type() == ScalarType::Double ? 8 : 4;
  std::vector<double> acc(parts * 2 * plane);
  for_parts(parts, rows, [&](int64_t part, int64_t begin, int64_t end) {
    std::vector<int64_t> held(args.slots, -1);
    std::vector<char> indices(args.slots * args.pooled[1] * plane * opmath_bytes);
    fn(args, begin, end, acc.data() + part * 2 * plane, indices.data(), held.data());
  });
  const auto total = [&](int64_t which, int64_t channel) {
    double sum = 0;
    for (int64_t part = 0; part < parts; ++part) sum += acc[(2 * part + which) * plane + channel];
    return sum;
  };
  return {g, sums_table(moments, [&](int64_t c) { return total(0, c); }, [&](int64_t c) { return total(1, c); })};
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CPU, m) {
  m.impl("pool_apply", TORCH_BOX(&pool_apply));
  m.impl("pool_bwd", TORCH_BOX(&pool_bwd));
}

} // namespace resnet_fused::cpu
