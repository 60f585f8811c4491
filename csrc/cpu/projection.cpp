// The projection shortcut on the CPU: one matrix product each, whose packing gathers, converts and differentiates and
// whose stores normalise, scatter and reduce (gemm.h). 16-bit activations are multiplied in float32.
//
// What it can cost, for ResNet-50's sites at batch 8 in float32, on one thread of an Ice Lake Xeon at about 2.8 GHz:
// 170 GFLOP/s of AVX-512 FMA in a loop of registers, memory read at 10 GB/s, stored to at 7.5, past the caches at 22.
// Traffic in MB is what is read + written; a backward is dgrad and wgrad, each reads g and y. Predicted is the FMAs'
// time plus the stores', reads being asked for while tiles are computed; measured is the least of interleaved runs on a
// machine whose other thread is at work, where the same micro-kernel alone, in cache, does 110 to 130 GFLOP/s.
//
//   site     GFLOP      forward: MB   predicted, measured ms   backward: MB   predicted, measured ms
//   layer1   0.8 (x 2)      6 + 26       6.0       8.5            116 +  6        10.5      19
//   layer2   1.6 (x 2)      7 + 13      10.3      12.6             84 + 26        20.6      30
//   layer3   1.6 (x 2)      5 +  6      10.5      13.1             43 + 15        20.3      30
//   layer4   1.6 (x 2)     10 +  3      10.1      13.3             29 + 15        21.4      30
//
// These times are of the micro-kernel of 14 x 32, before that of gemm_micro.h. What missed: its 46 instructions for 28 FMAs, which a core that is shared with another thread seems
// not to issue at full FMA speed (a quiet one did 150 to 179 GFLOP/s); at layer1, where products are only 64 deep,
// also a tile's store and statistics, a tenth of its FMAs.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "projection.h"

namespace resnet_fused::cpu {
namespace {

std::tuple<Tensor, Tensor> projection_fwd(const Tensor& x_any, const Tensor& weight_any, const OptionalTensor& bias,
                                          std::vector<int64_t> stride, bool stats, const OptionalTensor& moments,
                                          const OptionalTensor& add_any, const OptionalTensor& add_moments, bool relu,
                                          bool) {
  const ProjectionChecker check("projection_fwd");
  const auto s =
      check_projection_fwd(check, x_any, weight_any, bias, stride, stats, moments, add_any, add_moments, relu);
  const ScalarType dtype = x_any.scalar_type(), wide = opmath(dtype);
  const Tensor x = dense(x_any), weight = dense(weight_any);
  const OptionalTensor add = dense(add_any);
  const Tensor out = empty_channels_last(s.N, s.K, s.P, s.Q, dtype);
  const Tensor partials = torch::stable::new_zeros(out, {stats ? s.tiles() : 0, 3, s.K}, wide);

  ProjectionCall call(x, s, kEpiloguePlanes);
  call.args.x = x.const_data_ptr();
  call.args.weight = weight.const_data_ptr();
  call.args.add = data_of(add);
  call.args.partials = stats ? partials.mutable_data_ptr() : nullptr;
  call.args.plain = !bias.has_value() && !moments.has_value() && !add.has_value() && !relu;
  call.args.has_affine = moments.has_value();
  call.args.has_add_affine = add_moments.has_value();
  call.args.relu = relu;
  call.set_result(out, s.K);
  call.fill_bias(bias, wide);
  call.fill(kOwnMean, moments, {0, 2, 3});
  call.fill(kAddMean, add_moments, {0, 2, 3});
  product_shares(s, s.K, stats ? kTileRows : kPanelUnit).for_each([&](ProjectionTask& task, int64_t) {
    std::vector<double> acc(stats ? 3 * call.args.plane : 0);
    task.sums = acc.data();
    call.isa.projection_fwd[call.dtype](call.args, task);
  });
  return {out, partials};
}

Tensor projection_dgrad(const Tensor& g_any, const OptionalTensor& y_any, const Tensor& weight_any,
                        const OptionalTensor& moments, const OptionalTensor& sums, std::vector<int64_t> size,
                        std::vector<int64_t> stride, const OptionalTensor& add_any, bool) {
  const ProjectionChecker check("projection_dgrad");
  const auto s = check_projection_dgrad(check, g_any, y_any, weight_any, moments, sums, size, stride, add_any);
  const Tensor g = dense(g_any), weight = dense(weight_any);
  const OptionalTensor y = sums.has_value() ? dense(y_any) : OptionalTensor(), add = dense(add_any);
  const Tensor dx = empty_channels_last(s.N, s.C, s.H, s.W, g.scalar_type());

  ProjectionCall call(g, s, kProloguePlanes);
  call.args.g = g.const_data_ptr();
  call.args.y = data_of(y);
  call.args.weight = weight.const_data_ptr();
  call.args.add = data_of(add);
  call.set_result(dx, s.C);
  call.fill_gradient(moments, sums);
  product_shares(s, s.C, kPanelUnit).for_each([&](ProjectionTask& task, int64_t) {
    call.isa.projection_dgrad[call.dtype](call.args, task);
  });
  return dx;
}

std::tuple<Tensor, Tensor> projection_wgrad(const Tensor& g_any, const OptionalTensor& y_any, const Tensor& x_any,
                                            const OptionalTensor& moments, const OptionalTensor& sums,
                                            std::vector<int64_t> stride, ScalarType dtype, bool bias, bool) {
  const ProjectionChecker check("projection_wgrad");
  const auto s = check_projection_wgrad(check, g_any, y_any, x_any, moments, sums, stride, dtype);
  const Tensor g = dense(g_any), x = dense(x_any);
  const OptionalTensor y = sums.has_value() ? dense(y_any) : OptionalTensor();

  ProjectionCall call(g, s, kProloguePlanes);
  call.args.g = g.const_data_ptr();
  call.args.y = data_of(y);
  call.args.x = x.const_data_ptr();
  call.fill_gradient(moments, sums);
  const Shares shares = weight_shares(s);
  Parts parts(s, shares.rows.parts, opmath(x.scalar_type()), bias ? call.args.plane : 0);
  shares.for_each([&](ProjectionTask& task, int64_t row_part) {
    task.result = parts.weight_of(row_part);
    task.sums = parts.bias_of(row_part);
    call.isa.projection_wgrad[call.dtype](call.args, task);
  });
  return {parts.weight(dtype), parts.bias_sums(bias)};
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CPU, m) {
  m.impl("projection_fwd", TORCH_BOX(&projection_fwd));
  m.impl("projection_dgrad", TORCH_BOX(&projection_dgrad));
  m.impl("projection_wgrad", TORCH_BOX(&projection_wgrad));
}

} // namespace resnet_fused::cpu
