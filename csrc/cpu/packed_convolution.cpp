#include "packed_convolution.h"

#include "packed_weight.h"

namespace resnet_fused::cpu {
namespace {

double total(const Sums& sums, int64_t i) {
  double sum = 0;
  for (const auto& part : sums) sum += part[i];
  return sum;
}

} // namespace

PackedConvolution::PackedConvolution(const Tensor& x, const Tensor& weight, const Pair& stride,
                                     const Pair& padding, bool winograd)
    : own_(kernels(), dtype_of(x)),
      dtype_(x.scalar_type()),
      winograd_(winograd),
      weight_(dense(weight)),
      stride_(stride),
      padding_(padding),
      N_(x.size(0)),
      C_(x.size(1)),
      H_(x.size(2)),
      W_(x.size(3)),
      K_(weight.size(0)),
      R_(weight.size(2)),
      S_(weight.size(3)),
      P_((H_ + 2 * padding[0] - R_) / stride[0] + 1),
      Q_((W_ + 2 * padding[1] - S_) / stride[1] + 1) {}

void PackedConvolution::check_output(const Checker& check, const char* argument, const OptionalTensor& t) const {
  if (!t.has_value()) return;
  check.device(argument, *t);
  check.dtype(argument, *t, dtype_);
  const bool fits = t->dim() == 4 && t->size(0) == N_ && t->size(1) == K_ && t->size(2) == P_ && t->size(3) == Q_;
  if (!fits) check.require(false, argument, "shape " + shape_name({N_, K_, P_, Q_}), "shape " + shape_name(*t));
}

ConvArgs PackedConvolution::forward_args() const {
  ConvArgs c;
  c.batch = N_;
  c.channels = C_;
  c.outputs = K_;
  c.weight = weight_.const_data_ptr();
  const int64_t in[2] = {H_, W_}, out[2] = {P_, Q_}, filter[2] = {R_, S_};
  for (int d = 0; d < 2; ++d) {
    c.in[d] = in[d];
    c.out[d] = out[d];
    c.filter[d] = filter[d];
    c.stride[d] = stride_[d];
    c.before[d] = padding_[d];
  }
  c.band = band_of(c, own_);
  return c;
}

std::tuple<Tensor, int64_t> PackedConvolution::run_forward(const PackedImage& image,
                                                           const ProjectionCall& store) const {
  ConvArgs c = forward_args();
  ImageConstants constants(C_, own_.isa);
  image.attach(c.image, c.kind, constants);
  c.store = store.args;
  const Tensor y = empty_channels_last(N_, K_, P_, Q_, dtype_);
  ProjectionCall::stream(c.store, y, K_);
  const bool stats = c.store.partials != nullptr;
  Sums sums;
  Product(c, own_.kernels, stats ? kStatisticsRows : kPanelUnit).run(winograd_, sums, stats ? 3 * c.store.plane : 0);
  return {y, c.store.tile_rows};
}

std::tuple<Tensor, OptionalTensor> PackedConvolution::forward(const PackedImage& image, bool stats) const {
  const ProjectionSizes s = flat(C_, K_, N_ * P_ * Q_);
  ProjectionCall call(image.y, s, kEpiloguePlanes);
  OptionalTensor partials;
  const auto tiles_of = [&](int64_t rows) { return (s.rows() + rows - 1) / rows; };
  if (stats) {
    partials = empty({std::max(tiles_of(kStatisticsRows), N_), 3, K_}, {3 * K_, K_, 1}, ScalarType::Float);
    call.args.partials = partials->mutable_data_ptr();
  }
  call.args.plain = true;
  const auto [y, tile_rows] = run_forward(image, call);
  if (stats) partials = reinterpret(*partials, {tiles_of(tile_rows), 3, K_}, {3 * K_, K_, 1});
  return {y, partials};
}

Tensor PackedConvolution::infer(const Tensor& x, const Tensor& moments, const OptionalTensor& residual,
                                bool relu) const {
  ProjectionCall call(x, flat(C_, K_, N_ * P_ * Q_), kEpiloguePlanes);
  call.args.add = data_of(residual);
  call.args.has_affine = true;
  call.args.relu = relu;
  call.fill(kOwnMean, moments, {0, 2, 3});
  return std::get<0>(run_forward({x, std::nullopt, false}, call));
}

// Positions a of the height and b of the width, modulo the stride: a convolution of the gradient by every stride-th tap.
void PackedConvolution::dgrad_class(ConvArgs& c, int64_t a, int64_t b, Sums& sums) const {
  const int64_t start[2] = {a, b}, size[2] = {H_, W_};
  for (int d = 0; d < 2; ++d) {
    const int64_t step = stride_[d], taps = c.taps[d];
    int64_t last = taps - 1;
    while (last >= 0 && (start[d] + padding_[d] - last) % step != 0) --last;
    c.filter[d] = last < 0 ? 0 : last / step + 1;
    c.first_tap[d] = last;
    c.tap_step[d] = step;
    c.before[d] = last < 0 ? 0 : -((start[d] + padding_[d] - last) / step);
    c.out[d] = (size[d] - start[d] + step - 1) / step;
    c.grid[d] = size[d];
    c.grid_step[d] = step;
    c.grid_start[d] = start[d];
    if (c.out[d] == 0) return;
  }
  if (c.filter[0] == 0 || c.filter[1] == 0) c.filter[0] = c.filter[1] = 0;
  c.band = c.filter[0] == 0 ? 0 : band_of(c, own_);
  Sums own;
  Product(c, own_.kernels, kPanelUnit).run(winograd_, own, c.back.y != nullptr ? 3 * c.back.plane : 0);
  sums.insert(sums.end(), own.begin(), own.end());
}

PackedBackGrads PackedConvolution::backward_image(const PackedGradient& dy, const PackedBack& back) const {
  ConvArgs c;
  c.batch = N_;
  c.channels = K_;
  c.outputs = C_;
  c.in[0] = P_;
  c.in[1] = Q_;
  c.taps[0] = R_;
  c.taps[1] = S_;
  c.weight = weight_.const_data_ptr();
  c.is_mirrored = true;
  ImageConstants constants(K_, own_.isa), own(C_, own_.isa);
  dy.attach(c.image, c.kind, constants);
  const Tensor dx = empty_channels_last(N_, C_, H_, W_, dtype_);
  c.streamed = is_streamed(dx, C_);
  c.back.result = dx.mutable_data_ptr();
  c.back.skip = data_of(back.skip);
  c.back.out = data_of(back.out);
  c.back.y = data_of(back.y);
  c.back.residual = data_of(back.residual);
  c.back.relu = back.relu;
  if (back.moments.has_value()) own.fill(kMean, *back.moments, {0, 2, 3});
  if (back.residual_moments.has_value()) own.fill(kSecond, *back.residual_moments, {0});
  own.attach(c.back);
  Sums sums;
  for (int64_t a = 0; a < stride_[0]; ++a) {
    for (int64_t b = 0; b < stride_[1]; ++b) dgrad_class(c, a, b, sums);
  }
  PackedBackGrads grads{dx, std::nullopt, std::nullopt};
  const int64_t plane = own.plane();
  const auto sums_of = [&](int which, const Tensor& moments) {
    return sums_table(moments, [&](int64_t k) { return total(sums, k); },
                      [&](int64_t k) { return total(sums, which * plane + k); });
  };
  if (back.moments.has_value()) grads.sums = sums_of(1, *back.moments);
  if (back.residual_moments.has_value()) grads.residual_sums = sums_of(2, *back.residual_moments);
  return grads;
}

Tensor PackedConvolution::backward_weight(const PackedGradient& dy, const PackedImage& image) const {
  ConvArgs c = forward_args();
  ImageConstants constants(C_, own_.isa), of_dy(K_, own_.isa);
  image.attach(c.image, c.kind, constants);
  dy.attach(c.gradient, c.gradient_kind, of_dy);
  const auto shaped = [&](const Tensor& t) { return reinterpret(t, {K_, C_, R_, S_}, {R_ * S_ * C_, 1, S_ * C_, C_}); };
  const int64_t band = c.band;
  if (takes_narrow_weight(c, own_.kernels)) {
    if (const auto weight = narrow_weight(c, own_.kernels)) return shaped(*weight);
    c.band = band;
  }
  if (winograd_ && takes_winograd(c, own_.kernels, kFilterSaving)) {
    if (const auto weight = WeightPatches(c, own_.kernels).run()) return shaped(*weight);
  }
  const ProjectionSizes s = flat(C_ * R_ * S_, K_, N_ * P_ * Q_);
  const Shares shares = weight_shares(s);
  Parts parts(s, shares.rows.parts, ScalarType::Float, 0);
  shares.for_each([&](ProjectionTask& task, int64_t part) {
    task.result = parts.weight_of(part);
    if (c.band > 0) BandMemory::of_thread().reserve(c, own_.kernels, task, std::min(c.band, task.rows[1] - task.rows[0]));
    own_.kernels.wgrad(c, task);
  });
  return shaped(parts.sum());
}

} // namespace resnet_fused::cpu
