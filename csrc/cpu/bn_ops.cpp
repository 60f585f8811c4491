// The batch norm primitives that pass over activations, on the CPU.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <cstring>
#include <tuple>

#include "moments.h"
#include "pass.h"
#include "primitives.h"

namespace resnet_fused::cpu {
namespace {

Tensor sums_of(Pass& pass, int sum_g, int sum_gd, const Tensor& moments) {
  return sums_table(moments, [&](int64_t c) { return pass.channel_sum(sum_g, c); },
                    [&](int64_t c) { return pass.channel_sum(sum_gd, c); });
}

} // namespace

Tensor bn_stats(const Tensor& y_any) {
  const Checker check("bn_stats");
  check.activation("y", y_any);
  const Tensor y = dense(y_any);
  const int64_t C = y.size(1);
  Pass pass(y, 3);
  pass.run(pass.isa.stats);
  const Tensor partials = empty({1, 3, C}, {3 * C, C, 1}, opmath(y.scalar_type()));
  const char* data = static_cast<const char*>(y.const_data_ptr());
  const Table table(partials);
  const int64_t rows = y.numel() / C;
  for (int64_t c = 0; c < C; ++c) {
    double mean = 0, m2 = 0;
    pass.channel_moments(c, &mean, &m2);
    if (!std::isfinite(mean)) plain_moments(pass.dtype, data + c * y.element_size(), rows, C, &mean, &m2);
    table.set(0, c, static_cast<double>(rows));
    table.set(1, c, mean);
    table.set(2, c, m2);
  }
  return partials;
}

namespace {

// An option A shortcut, (N, c, P * stride, Q * stride) to be laid under channels [offset, offset + c).
struct Padded {
  const Tensor& residual;
  int64_t stride, offset;
  int64_t channels, P, Q;

  // Rows [begin, end) of the flattened (N, P, Q) into `rows`, which is zero outside those channels.
  void copy_rows(int64_t begin, int64_t end, char* rows) const {
    const int64_t own = residual.size(1), H = residual.size(2), W = residual.size(3);
    const auto element = static_cast<int64_t>(residual.element_size());
    const char* data = static_cast<const char*>(residual.const_data_ptr());
    for (int64_t row = begin; row < end; ++row) {
      const int64_t q = row % Q, p = row / Q % P, n = row / Q / P;
      const int64_t source = ((n * H + p * stride) * W + q * stride) * own;
      std::memcpy(rows + ((row - begin) * channels + offset) * element, data + source * element, own * element);
    }
  }
};

void run_padded(Pass& pass, const Padded& padded) {
  constexpr int64_t kBlockElements = 4096;
  const auto element = static_cast<int64_t>(padded.residual.element_size());
  const int64_t C = padded.channels, width = pass.tiling.width;
  const int64_t block = std::max<int64_t>(1, kBlockElements / width) * width;
  const BnKernel fn = pass.isa.apply[pass.dtype];
  pass.for_each([&](int64_t, int64_t begin, int64_t end) {
    std::vector<char> rows(block * element);
    BnArgs args = pass.args;
    args.residual = rows.data();
    for (int64_t i = begin; i < end; i += block) {
      const int64_t stop = std::min(end, i + block);
      padded.copy_rows(i / C, stop / C, rows.data());
      args.y = static_cast<const char*>(pass.args.y) + i * element;
      args.result = static_cast<char*>(pass.args.result) + i * element;
      fn(args, 0, stop - i, nullptr);
    }
  });
}

void check_padded(const Checker& check, const Tensor& y, const Tensor& residual, int64_t stride, int64_t offset) {
  check.require(stride >= 1, "residual_stride", "an integer >= 1", stride);
  check.require(offset >= 0 && offset <= y.size(1), "channel_offset", "an integer in [0, C]", offset);
  const bool fits = residual.dim() == 4 && residual.size(0) == y.size(0) &&
      residual.size(1) + offset <= y.size(1) && (residual.size(2) + stride - 1) / stride == y.size(2) &&
      (residual.size(3) + stride - 1) / stride == y.size(3);
  if (!fits) {
    check.require(false, "residual",
                  "shape " + shape_name(y) + ", or one that gives it when subsampled by residual_stride and padded by "
                  "channel_offset zeros in front",
                  "shape " + shape_name(residual));
  }
}

bool same_shape(const Tensor& a, const Tensor& b) {
  bool same = a.dim() == b.dim();
  for (int64_t d = 0; same && d < a.dim(); ++d) same = a.size(d) == b.size(d);
  return same;
}

} // namespace

// act(z + shortcut) of a dense y into out, which may be y itself: an element is read before it is written.
static void apply_onto(const Checker& check, const Tensor& out, const Tensor& y, const Tensor& moments,
                       const OptionalTensor& residual_any, const OptionalTensor& residual_moments,
                       int64_t residual_stride, int64_t channel_offset, bool relu) {
  const int64_t C = y.size(1);
  const ScalarType wide = opmath(y.scalar_type());
  check.table("moments", moments, 5, C, wide);
  bool pad = false;
  if (residual_any.has_value()) {
    check.device("residual", *residual_any);
    check.dtype("residual", *residual_any, y.scalar_type());
    pad = !residual_moments.has_value() && !same_shape(*residual_any, y);
    pad ? check_padded(check, y, *residual_any, residual_stride, channel_offset)
        : check.like("residual", *residual_any, y);
    if (residual_moments.has_value()) check.table("residual_moments", *residual_moments, 5, C, wide);
  }
  const OptionalTensor residual = dense(residual_any);
  Pass pass(y, 0);
  pass.constants.fill_affine(kMean, moments);
  if (residual.has_value() && residual_moments.has_value()) pass.constants.fill_affine(kSecond, *residual_moments);
  pass.args.result = out.mutable_data_ptr();
  pass.args.relu = relu;
  pass.args.residual = data_of(residual);
  pass.args.shortcut = !residual.has_value() ? kNoShortcut
      : residual_moments.has_value()         ? kProjectionShortcut
                                             : kPlainShortcut;
  if (pad) {
    run_padded(pass, {*residual, residual_stride, channel_offset, C, y.size(2), y.size(3)});
  } else {
    pass.run(pass.isa.apply);
  }
}

Tensor bn_apply(const Tensor& y_any, const Tensor& moments, const OptionalTensor& residual,
                const OptionalTensor& residual_moments, int64_t residual_stride, int64_t channel_offset, bool relu) {
  const Checker check("bn_apply");
  check.activation("y", y_any);
  const Tensor y = dense(y_any);
  const Tensor out = empty_channels_last_like(y);
  apply_onto(check, out, y, moments, residual, residual_moments, residual_stride, channel_offset, relu);
  return out;
}

void bn_apply_in_place(const Tensor& y, const Tensor& moments, const OptionalTensor& residual, bool relu) {
  apply_onto(Checker("site_infer"), y, y, moments, residual, std::nullopt, 1, 0, relu);
}

namespace {

Tensor reduce(const char* op, const Tensor& dout_any, const Tensor& y_any, const Tensor& moments, bool relu,
              Tensor* rebuilt) {
  const Checker check(op);
  check.activation("y", y_any);
  check.like("dout", dout_any, y_any);
  check.table("moments", moments, 5, y_any.size(1), opmath(y_any.scalar_type()));
  const Tensor y = dense(y_any), dout = dense(dout_any);
  Pass pass(y, 2);
  pass.constants.fill_affine(kMean, moments);
  pass.args.grad = dout.const_data_ptr();
  pass.args.relu = relu;
  if (rebuilt != nullptr) {
    *rebuilt = empty_channels_last_like(y);
    pass.args.result = rebuilt->mutable_data_ptr();
  }
  pass.run(pass.isa.bwd_reduce);
  return sums_of(pass, 0, 1, moments);
}

} // namespace

Tensor bn_bwd_reduce(const Tensor& dout, const Tensor& y, const Tensor& moments, bool relu) {
  return reduce("bn_bwd_reduce", dout, y, moments, relu, nullptr);
}

std::tuple<Tensor, Tensor> bn_bwd_reduce_rebuild(const Tensor& dout, const Tensor& y, const Tensor& moments,
                                                 bool relu) {
  Tensor act;
  Tensor sums = reduce("bn_bwd_reduce_rebuild", dout, y, moments, relu, &act);
  return {sums, act};
}

std::tuple<Tensor, Tensor, Tensor> join_bwd_reduce(const Tensor& dout_any, const OptionalTensor& dskip_any,
                                                   const OptionalTensor& out_any, const Tensor& y_any,
                                                   const Tensor& moments, const OptionalTensor& residual_y_any,
                                                   const OptionalTensor& residual_moments) {
  const Checker check("join_bwd_reduce");
  check.activation("y", y_any);
  const ScalarType wide = opmath(y_any.scalar_type());
  check.like("dout", dout_any, y_any);
  check.like("dskip", dskip_any, y_any);
  check.like("out", out_any, y_any);
  check.table("moments", moments, 5, y_any.size(1), wide);
  const bool projection = residual_y_any.has_value() && residual_moments.has_value();
  if (projection) {
    check.like("residual_y", residual_y_any, y_any);
    check.table("residual_moments", *residual_moments, 5, y_any.size(1), wide);
  }
  const Tensor y = dense(y_any), dout = dense(dout_any);
  const OptionalTensor dskip = dense(dskip_any), out = dense(out_any);
  const OptionalTensor residual_y = projection ? dense(residual_y_any) : OptionalTensor();
  const Tensor g = empty_channels_last_like(y);
  Pass pass(y, 3);
  pass.constants.fill_affine(kMean, moments);
  if (projection) pass.constants.fill_affine(kSecond, *residual_moments);
  pass.args.grad = dout.const_data_ptr();
  pass.args.skip = data_of(dskip);
  pass.args.out = data_of(out);
  pass.args.residual = data_of(residual_y);
  pass.args.result = g.mutable_data_ptr();
  pass.run(pass.isa.join_bwd_reduce);
  return {g, sums_of(pass, 0, 1, moments),
          projection ? sums_of(pass, 0, 2, *residual_moments) : empty({0}, {1}, wide)};
}

Tensor bn_bwd_apply(const Tensor& g_any, const Tensor& y_any, const Tensor& moments, const Tensor& coef, bool relu) {
  const Checker check("bn_bwd_apply");
  check.activation("y", y_any);
  const ScalarType wide = opmath(y_any.scalar_type());
  check.like("g", g_any, y_any);
  check.table("moments", moments, 5, y_any.size(1), wide);
  const bool training = coef.dim() != 2 || coef.size(0) != 1;
  check.table("coef", coef, training ? 3 : 1, y_any.size(1), wide);
  const Tensor y = dense(y_any), g = dense(g_any);
  const Tensor dy = empty_channels_last_like(y);
  Pass pass(y, 0);
  pass.constants.fill_affine(kMean, moments);
  if (training) {
    pass.constants.fill(kSecond, coef, {0, 1, 2});
  } else {
    pass.constants.fill(kSecond, coef, {0});
  }
  pass.args.training = training;
  pass.args.grad = g.const_data_ptr();
  pass.args.result = dy.mutable_data_ptr();
  pass.args.relu = relu;
  pass.run(pass.isa.bwd_apply);
  return dy;
}

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CPU, m) {
  m.impl("bn_stats", TORCH_BOX(&bn_stats));
  m.impl("bn_apply", TORCH_BOX(&bn_apply));
  m.impl("bn_bwd_reduce", TORCH_BOX(&bn_bwd_reduce));
  m.impl("bn_bwd_reduce_rebuild", TORCH_BOX(&bn_bwd_reduce_rebuild));
  m.impl("join_bwd_reduce", TORCH_BOX(&join_bwd_reduce));
  m.impl("bn_bwd_apply", TORCH_BOX(&bn_bwd_apply));
}

} // namespace resnet_fused::cpu
