// Whole sites in one call: the primitives around PyTorch's convolution, in the order of engines/library.py, which is
// their specification. A call of its own for each primitive costs more than its arithmetic on a small activation.
#include <torch/csrc/stable/library.h>

#include <cstring>
#include <tuple>

#include "convolution.h"
#include "primitives.h"

namespace resnet_fused::cpu {
namespace {

// What a site convolves: the plain tensor, or act(z + shortcut) made of a pending one.
struct Source {
  const Tensor& y;
  const OptionalTensor& moments;
  const OptionalTensor& residual;
  const OptionalTensor& residual_moments;
  int64_t residual_stride, channel_offset;
  bool relu;

  Tensor load() const {
    if (!moments.has_value()) return y;
    return bn_apply(y, *moments, residual, residual_moments, residual_stride, channel_offset, relu);
  }
};

// Bits of an op's `packed`: our own matrix products run the convolution where they can, by Winograd where it is faster.
enum Packed : int64_t { kPack = 1, kWinograd = 2 };

Tensor nothing(const Tensor& like) { return empty({0}, {1}, like.scalar_type()); }

Tensor or_nothing(const OptionalTensor& t, const Tensor& like) { return t.has_value() ? *t : nothing(like); }

struct Convolved {
  Tensor x, y;
  OptionalTensor partials;
};

// `x` is what was convolved where it was made (`keep` it) or needed, else the raw source.
Convolved convolve(const Convolution& conv, const Source& source, const Tensor& weight, bool keep, bool stats,
                   int64_t packed) {
  if ((packed & kPack) == 0 || !conv.can_pack(source.y, weight)) {
    const Tensor x = source.load();
    return {x, conv.forward(x, weight), std::nullopt};
  }
  const bool pending = source.moments.has_value() && !source.residual.has_value() && !keep;
  const Tensor x = pending ? dense(source.y) : dense(source.load());
  const OptionalTensor moments = pending ? source.moments : OptionalTensor();
  auto [y, partials] = conv.packed(x, weight, (packed & kWinograd) != 0).forward({x, moments, source.relu}, stats);
  return {x, y, partials};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> site_fwd(
    const Tensor& src, const OptionalTensor& src_moments, const OptionalTensor& residual,
    const OptionalTensor& residual_moments, int64_t residual_stride, int64_t channel_offset, bool src_relu, bool join,
    const Tensor& weight, const OptionalTensor& conv_bias, const OptionalTensor& gamma, const OptionalTensor& beta,
    const OptionalTensor& running_mean, const OptionalTensor& running_var, const OptionalTensor& num_batches_tracked,
    int64_t stride_h, int64_t stride_w, int64_t padding_h, int64_t padding_w, int64_t dilation_h, int64_t dilation_w,
    int64_t groups, bool training, std::optional<double> momentum, double eps, int64_t packed) {
  const Checker check("site_fwd");
  const Convolution conv{{stride_h, stride_w}, {padding_h, padding_w}, {dilation_h, dilation_w}, groups};
  conv.check(check, src, weight);
  const bool has_running = running_mean.has_value() && running_var.has_value();
  check.require(training || has_running, "running_mean, running_var", "tensors, without training", "None");
  const NoGrad no_grad;
  const Source source{src, src_moments, residual, residual_moments, residual_stride, channel_offset, src_relu};
  const auto [x, y, partials] = convolve(conv, source, weight, join, training, packed);
  const int64_t K = y.size(1);
  check.require(!training || y.numel() != K, "src", "more than one value per channel in training", 1);
  const auto finalize = [&](const Tensor& statistics) {
    return bn_finalize(statistics, gamma, beta, conv_bias, running_mean, running_var, num_batches_tracked, momentum,
                       eps);
  };
  const Tensor moments = training
      ? finalize(partials.has_value() ? *partials : bn_stats(y))
      : bn_eval_moments(*running_mean, *running_var, gamma, beta, conv_bias, eps, opmath(y.scalar_type()));
  const Tensor carrier = empty_table(2, K, moments.scalar_type());
  std::memset(carrier.mutable_data_ptr(), 0, 2 * K * carrier.element_size());  // read by nobody, but repeatable
  return {y, moments, carrier, join ? x : nothing(y)};
}

// With running statistics and nothing to keep: the batch norm, the add and the ReLU in one pass over y, in its memory.
Tensor site_infer(const Tensor& src, const OptionalTensor& residual, const Tensor& weight,
                  const OptionalTensor& conv_bias, const OptionalTensor& gamma, const OptionalTensor& beta,
                  const Tensor& running_mean, const Tensor& running_var, int64_t stride_h, int64_t stride_w,
                  int64_t padding_h, int64_t padding_w, int64_t dilation_h, int64_t dilation_w, int64_t groups,
                  double eps, bool relu, int64_t packed) {
  const Checker check("site_infer");
  const Convolution conv{{stride_h, stride_w}, {padding_h, padding_w}, {dilation_h, dilation_w}, groups};
  conv.check(check, src, weight);
  const NoGrad no_grad;
  const Tensor moments =
      bn_eval_moments(running_mean, running_var, gamma, beta, conv_bias, eps, opmath(src.scalar_type()));
  if ((packed & kPack) != 0 && conv.can_pack(src, weight)) {
    const Tensor x = dense(src);
    const PackedConvolution product = conv.packed(x, weight, (packed & kWinograd) != 0);
    product.check_output(check, "residual", residual);
    return product.infer(x, moments, dense(residual), relu);
  }
  const Tensor y = conv.forward(src, weight);
  bn_apply_in_place(y, moments, residual, relu);
  return y;
}

Tensor site_rebuild(const Tensor& src, const OptionalTensor& src_moments, const OptionalTensor& residual,
                    const OptionalTensor& residual_moments, int64_t residual_stride, int64_t channel_offset,
                    bool src_relu, const Tensor& weight, int64_t stride_h, int64_t stride_w, int64_t padding_h,
                    int64_t padding_w, int64_t dilation_h, int64_t dilation_w, int64_t groups, int64_t packed) {
  const Checker check("site_rebuild");
  const Convolution conv{{stride_h, stride_w}, {padding_h, padding_w}, {dilation_h, dilation_w}, groups};
  conv.check(check, src, weight);
  const NoGrad no_grad;
  const Source source{src, src_moments, residual, residual_moments, residual_stride, channel_offset, src_relu};
  return convolve(conv, source, weight, false, false, packed).y;
}

// A parameter's gradient: `value(c)` in the parameter's dtype.
template <class Value>
Tensor parameter_grad(const OptionalTensor& parameter, const Tensor& sums, const Value& value) {
  if (!parameter.has_value()) return nothing(sums);
  const int64_t C = sums.size(1);
  const Tensor grad = empty({C}, {1}, sums.scalar_type());
  const Table out(grad);
  for (int64_t c = 0; c < C; ++c) out.set(0, c, value(c));
  return as_dtype(grad, parameter->scalar_type());
}

struct SourceGrads {
  OptionalTensor source, sums, residual_sums, weight;
};

// The activation is not kept: it is rebuilt in the pass that reduces its gradient or, where a second call of the
// convolution would cost more than a second pass, before the convolution makes both gradients at once.
SourceGrads pending_grads(const Convolution& conv, const Source& source, const Tensor& weight, const Tensor& dy,
                          bool need_source, bool need_weight) {
  SourceGrads grads;
  if (!need_source || (need_weight && conv.is_small(source.y, weight))) {
    std::tie(grads.source, grads.weight) = conv.backward(dy, source.load(), weight, need_source, need_weight);
    if (need_source) grads.sums = bn_bwd_reduce(*grads.source, source.y, *source.moments, source.relu);
    return grads;
  }
  grads.source = std::get<0>(conv.backward(dy, source.y, weight, true, false));
  if (!need_weight) {
    grads.sums = bn_bwd_reduce(*grads.source, source.y, *source.moments, source.relu);
    return grads;
  }
  auto [sums, act] = bn_bwd_reduce_rebuild(*grads.source, source.y, *source.moments, source.relu);
  grads.sums = sums;
  grads.weight = std::get<1>(conv.backward(dy, act, weight, false, true));
  return grads;
}

// `x` is the activation as it was convolved, and `dskip` a second gradient of it.
SourceGrads kept_grads(const Convolution& conv, const Source& source, const Tensor& x, const OptionalTensor& dskip,
                       const Tensor& weight, const Tensor& dy, bool need_source, bool need_weight) {
  SourceGrads grads;
  std::tie(grads.source, grads.weight) = conv.backward(dy, x, weight, need_source, need_weight);
  if (!need_source) return grads;
  if (!source.moments.has_value()) {
    if (dskip.has_value()) {
      AtenTensorHandle sum = nullptr;
      STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_add_Tensor(grads.source->get(), dskip->get(), 1.0, &sum));
      grads.source = exactly_channels_last(Tensor(sum));
    }
    return grads;
  }
  const OptionalTensor out = source.relu ? OptionalTensor(x) : OptionalTensor();
  auto [g, sums, residual_sums] = join_bwd_reduce(*grads.source, dskip, out, source.y, *source.moments,
                                                  source.residual, source.residual_moments);
  grads.source = g;
  grads.sums = sums;
  grads.residual_sums = residual_sums;
  return grads;
}

// With our own matrix products: dy is not stored, nor an activation that was not kept.
SourceGrads packed_grads(const PackedConvolution& conv, const Source& source, const OptionalTensor& x,
                         const OptionalTensor& dskip, const PackedGradient& dy, bool need_source, bool need_weight) {
  SourceGrads grads;
  const Tensor raw = dense(source.y);
  const OptionalTensor kept = dense(x);
  if (need_source) {
    PackedBack back{dense(dskip), std::nullopt, std::nullopt, source.moments, std::nullopt, std::nullopt, source.relu};
    if (source.moments.has_value()) {
      back.y = raw;
      if (kept.has_value() && source.relu) back.out = kept;
      if (source.residual_moments.has_value()) back.residual = dense(source.residual);
      back.residual_moments = source.residual_moments;
    }
    if (kept.has_value()) back.relu = false;
    PackedBackGrads made = conv.backward_image(dy, back);
    grads.source = made.g;
    grads.sums = made.sums;
    grads.residual_sums = made.residual_sums;
  }
  if (need_weight) {
    const OptionalTensor none;
    grads.weight = kept.has_value() ? conv.backward_weight(dy, {*kept, none, false})
                                    : conv.backward_weight(dy, {raw, source.moments, source.relu});
  }
  return grads;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> site_bwd(
    const Tensor& src, const OptionalTensor& src_moments, const OptionalTensor& residual,
    const OptionalTensor& residual_moments, bool src_relu, const OptionalTensor& x, const OptionalTensor& dskip,
    const Tensor& weight, const OptionalTensor& conv_bias, const OptionalTensor& gamma, const OptionalTensor& beta,
    const Tensor& y, const Tensor& moments, const Tensor& g, const Tensor& sums, int64_t stride_h,
    int64_t stride_w, int64_t padding_h, int64_t padding_w, int64_t dilation_h, int64_t dilation_w, int64_t groups,
    bool relu, bool training, bool need_source, bool need_weight, int64_t packed) {
  const Checker check("site_bwd");
  const Convolution conv{{stride_h, stride_w}, {padding_h, padding_w}, {dilation_h, dilation_w}, groups};
  conv.check(check, src, weight);
  check.require(need_source || need_weight, "need_source, need_weight", "one of them", "neither");
  const NoGrad no_grad;
  const Tensor coef = bn_bwd_finalize(sums, moments, training);
  const Source source{src, src_moments, residual, residual_moments, 1, 0, src_relu};
  SourceGrads grads;
  if ((packed & kPack) != 0 && conv.can_pack(src, weight)) {
    const PackedConvolution product = conv.packed(src, weight, (packed & kWinograd) != 0);
    product.check_output(check, "g", g);
    product.check_output(check, "y", y);
    for (const OptionalTensor& t : {x, dskip, residual}) check.like("x, dskip, residual", t, src);
    const Tensor dense_g = dense(g), dense_y = dense(y);
    const PackedGradient dy{dense_g, dense_y, moments, coef, relu};
    grads = packed_grads(product, source, x, dskip, dy, need_source, need_weight);
    if (need_weight) grads.weight = like_parameter(*grads.weight, weight);
  } else {
    const Tensor dy = bn_bwd_apply(g, y, moments, coef, relu);
    grads = x.has_value() ? kept_grads(conv, source, *x, dskip, weight, dy, need_source, need_weight)
                          : pending_grads(conv, source, weight, dy, need_source, need_weight);
  }
  const Tensor dense_sums = contiguous_table(sums), dense_moments = contiguous_table(moments);
  const Table s(dense_sums), m(dense_moments);
  const auto dbias = [&](int64_t c) {
    return training ? (s.get(0, c) + s.get(1, c)) * 0 : m.get(2, c) * s.get(0, c);
  };
  return {or_nothing(grads.source, y),
          or_nothing(grads.sums, sums),
          or_nothing(grads.residual_sums, sums),
          or_nothing(grads.weight, weight),
          parameter_grad(conv_bias, dense_sums, dbias),
          parameter_grad(gamma, dense_sums, [&](int64_t c) { return s.get(1, c); }),
          parameter_grad(beta, dense_sums, [&](int64_t c) { return s.get(0, c); })};
}

} // namespace

// What is static about the convolution is passed number by number: a list costs as much as the rest of a call.
STABLE_TORCH_LIBRARY_FRAGMENT(resnet_fused, m) {
  m.def(
      "site_fwd(Tensor src, Tensor? src_moments, Tensor? residual, Tensor? residual_moments, int residual_stride, "
      "int channel_offset, bool src_relu, bool join, Tensor weight, Tensor? conv_bias, Tensor? gamma, Tensor? beta, "
      "Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, int stride_h, int stride_w, "
      "int padding_h, int padding_w, int dilation_h, int dilation_w, int groups, bool training, float? momentum, "
      "float eps, int packed) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "site_infer(Tensor src, Tensor? residual, Tensor weight, Tensor? conv_bias, Tensor? gamma, Tensor? beta, "
      "Tensor running_mean, Tensor running_var, int stride_h, int stride_w, int padding_h, int padding_w, "
      "int dilation_h, int dilation_w, int groups, float eps, bool relu, int packed) -> Tensor");
  m.def(
      "site_rebuild(Tensor src, Tensor? src_moments, Tensor? residual, Tensor? residual_moments, int residual_stride, "
      "int channel_offset, bool src_relu, Tensor weight, int stride_h, int stride_w, int padding_h, int padding_w, "
      "int dilation_h, int dilation_w, int groups, int packed) -> Tensor");
  m.def(
      "site_bwd(Tensor src, Tensor? src_moments, Tensor? residual, Tensor? residual_moments, bool src_relu, Tensor? x, "
      "Tensor? dskip, Tensor weight, Tensor? conv_bias, Tensor? gamma, Tensor? beta, Tensor y, Tensor moments, "
      "Tensor g, Tensor sums, int stride_h, int stride_w, int padding_h, int padding_w, int dilation_h, "
      "int dilation_w, int groups, bool relu, bool training, bool need_source, bool need_weight, int packed) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CPU, m) {
  m.impl("site_fwd", TORCH_BOX(&site_fwd));
  m.impl("site_infer", TORCH_BOX(&site_infer));
  m.impl("site_rebuild", TORCH_BOX(&site_rebuild));
  m.impl("site_bwd", TORCH_BOX(&site_bwd));
}

} // namespace resnet_fused::cpu
