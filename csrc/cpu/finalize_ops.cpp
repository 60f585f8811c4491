// The per-channel primitives: statistics to moments, sums to coefficients. In double inside, rounded once.
#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>

#include "host.h"
#include "primitives.h"

namespace resnet_fused::cpu {
namespace {

// A 1-d tensor of any float dtype and stride, read and written as double.
class Channels {
 public:
  explicit Channels(const Tensor& t)
      : data_(t.mutable_data_ptr()), stride_(t.numel() > 1 ? t.stride(t.dim() - 1) : 1), dtype_(dtype_of(t)) {}

  double get(int64_t i) const {
    switch (dtype_) {
      case kBFloat16:
        return static_cast<float>(static_cast<const c10::BFloat16*>(data_)[i * stride_]);
      case kFloat16:
        return static_cast<float>(static_cast<const c10::Half*>(data_)[i * stride_]);
      case kFloat64:
        return static_cast<const double*>(data_)[i * stride_];
      default:
        return static_cast<const float*>(data_)[i * stride_];
    }
  }

  void set(int64_t i, double value) const {
    switch (dtype_) {
      case kBFloat16:
        static_cast<c10::BFloat16*>(data_)[i * stride_] = static_cast<float>(value);
        break;
      case kFloat16:
        static_cast<c10::Half*>(data_)[i * stride_] = static_cast<float>(value);
        break;
      case kFloat64:
        static_cast<double*>(data_)[i * stride_] = value;
        break;
      default:
        static_cast<float*>(data_)[i * stride_] = static_cast<float>(value);
    }
  }

 private:
  void* data_;
  int64_t stride_;
  DType dtype_;
};

double get_or(const std::optional<Channels>& channels, int64_t i, double fallback) {
  return channels.has_value() ? channels->get(i) : fallback;
}

std::optional<Channels> channels_of(const OptionalTensor& t) {
  return t.has_value() ? std::optional<Channels>(*t) : std::nullopt;
}

struct Affine {
  std::optional<Channels> weight, bias;
  double eps;

  void store(const Table& moments, int64_t c, double mean, double var, double inv) const {
    const double rstd = 1 / std::sqrt(var + eps);
    moments.set(0, c, mean);
    moments.set(1, c, rstd);
    moments.set(2, c, get_or(weight, c, 1) * rstd);
    moments.set(3, c, get_or(bias, c, 0));
    moments.set(4, c, inv);
  }
};

// The running buffers and how far a batch moves them.
struct Running {
  Channels mean, var;
  std::optional<Channels> conv_bias;
  double factor;

  void move(int64_t c, double count, double batch_mean, double m2) const {
    if (!(count > 0)) return;
    const double unbiased = m2 / std::max(count - 1, 1.0);
    mean.set(c, (1 - factor) * mean.get(c) + factor * (batch_mean + get_or(conv_bias, c, 0)));
    var.set(c, (1 - factor) * var.get(c) + factor * unbiased);
  }
};

void finalize(const Tensor& partials, const Affine& affine, const std::optional<Running>& running,
              const Tensor& moments) {
  const Table in(partials), out(moments);
  const int64_t parts = partials.size(0);
  for (int64_t c = 0; c < in.channels(); ++c) {
    double count = in.get(0, c), mean = in.get(1, c), m2 = in.get(2, c);
    for (int64_t t = 1; t < parts; ++t) {
      const double n = in.get(3 * t, c), total = count + n, share = total > 0 ? n / std::max(total, 1.0) : 0;
      const double delta = in.get(3 * t + 1, c) - mean;
      // an infinite mean stays infinite beside finite ones, as in a sum
      mean = std::isfinite(delta) ? mean + delta * share : mean + in.get(3 * t + 1, c);
      m2 += in.get(3 * t + 2, c) + delta * (delta * (count * share));
      count = total;
    }
    const double inv = 1 / std::max(count, 1.0);
    if (running.has_value()) running->move(c, count, mean, m2);
    affine.store(out, c, mean, m2 * inv, inv);
  }
}

void check_partials(const Checker& check, const Tensor& partials) {
  check.device("partials", partials);
  const ScalarType dtype = partials.scalar_type();
  if (dtype != ScalarType::Float && dtype != ScalarType::Double) {
    check.require(false, "partials", "float32 or float64", dtype_name(dtype));
  }
  if (partials.dim() != 3 || partials.size(0) < 1 || partials.size(1) != 3) {
    check.require(false, "partials", "shape (T, 3, C) with T >= 1", "shape " + shape_name(partials));
  }
}

} // namespace

Tensor bn_finalize(const Tensor& partials_any, const OptionalTensor& weight, const OptionalTensor& bias,
                   const OptionalTensor& conv_bias, const OptionalTensor& running_mean,
                   const OptionalTensor& running_var, const OptionalTensor& num_batches_tracked,
                   std::optional<double> momentum, double eps) {
  const Checker check("bn_finalize");
  check_partials(check, partials_any);
  const int64_t C = partials_any.size(2);
  check.vector("weight", weight, C);
  check.vector("bias", bias, C);
  check.vector("conv_bias", conv_bias, C);
  check.vector("running_mean", running_mean, C);
  check.vector("running_var", running_var, C);
  int64_t* tracked = nullptr;
  if (num_batches_tracked.has_value()) {
    check.device("num_batches_tracked", *num_batches_tracked);
    check.dtype("num_batches_tracked", *num_batches_tracked, ScalarType::Long);
    check.require(num_batches_tracked->numel() == 1, "num_batches_tracked", "one element",
                  num_batches_tracked->numel());
    tracked = static_cast<int64_t*>(num_batches_tracked->mutable_data_ptr());
  }
  const bool moves = running_mean.has_value() && running_var.has_value();
  check.require(!moves || momentum.has_value() || tracked != nullptr, "num_batches_tracked",
                "a counter, which momentum=None needs", "None");
  if (tracked != nullptr) ++*tracked;
  std::optional<Running> running;
  if (moves) {
    const double factor = momentum.has_value() ? *momentum : 1 / static_cast<double>(*tracked);
    running = Running{Channels(*running_mean), Channels(*running_var), channels_of(conv_bias), factor};
  }
  const Tensor partials = contiguous_table(partials_any);
  const Affine affine{channels_of(weight), channels_of(bias), eps};
  const Tensor moments = empty_table(5, C, partials.scalar_type());
  finalize(partials, affine, running, moments);
  return moments;
}

Tensor bn_eval_moments(const Tensor& running_mean, const Tensor& running_var, const OptionalTensor& weight,
                       const OptionalTensor& bias, const OptionalTensor& conv_bias, double eps, ScalarType dtype) {
  const Checker check("bn_eval_moments");
  const int64_t C = running_mean.dim() == 1 ? running_mean.size(0) : -1;
  check.require(C >= 0, "running_mean", "shape (C,)", "shape " + shape_name(running_mean));
  check.vector("running_mean", running_mean, C);
  check.vector("running_var", running_var, C);
  check.vector("weight", weight, C);
  check.vector("bias", bias, C);
  check.vector("conv_bias", conv_bias, C);
  check.require(dtype == ScalarType::Float || dtype == ScalarType::Double, "dtype", "float32 or float64",
                dtype_name(dtype));
  const Affine affine{channels_of(weight), channels_of(bias), eps};
  const Tensor moments = empty_table(5, C, dtype);
  const Channels mean(running_mean), var(running_var);
  const std::optional<Channels> shift = channels_of(conv_bias);
  const Table out(moments);
  for (int64_t c = 0; c < C; ++c) affine.store(out, c, mean.get(c) - get_or(shift, c, 0), var.get(c), 0);
  return moments;
}

Tensor bn_bwd_finalize(const Tensor& sums_any, const Tensor& moments_any, bool training) {
  const Checker check("bn_bwd_finalize");
  const ScalarType dtype = opmath(moments_any.scalar_type());
  const int64_t C = moments_any.dim() == 2 ? moments_any.size(1) : 0;
  check.table("moments", moments_any, 5, C, dtype);
  check.table("sums", sums_any, 2, C, dtype);
  const Tensor dense_sums = contiguous_table(sums_any), dense_moments = contiguous_table(moments_any);
  const Tensor coef = empty_table(training ? 3 : 1, C, dtype);
  const Table sums(dense_sums), moments(dense_moments), out(coef);
  for (int64_t c = 0; c < C; ++c) {
    const double rstd = moments.get(1, c), scale = moments.get(2, c), inv = moments.get(4, c);
    out.set(0, c, scale);
    if (!training) continue;
    out.set(1, c, -scale * rstd * sums.get(1, c) * inv);
    out.set(2, c, -scale * sums.get(0, c) * inv);
  }
  return coef;
}

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CPU, m) {
  m.impl("bn_finalize", TORCH_BOX(&bn_finalize));
  m.impl("bn_eval_moments", TORCH_BOX(&bn_eval_moments));
  m.impl("bn_bwd_finalize", TORCH_BOX(&bn_bwd_finalize));
}

} // namespace resnet_fused::cpu
