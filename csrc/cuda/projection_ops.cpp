// The projection ops on CUDA tensors: checks, allocation, the plan, launches on the current stream. The schemas
// are registered by the CPU library.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <stdexcept>
#include <tuple>
#include <vector>

#include "../layout.h"
#include "../projection_checks.h"
#include "device.h"
#include "launch.h"

namespace resnet_fused::cuda {
namespace {

// The device of an op's tensors as the current one, its stream, and what the plan asks of it.
class Call {
 public:
  explicit Call(const Tensor& t)
      : index_(t.get_device_index()), guard_(index_), device_(describe(index_)) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream_));
  }

  Tensor empty(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides, ScalarType dtype) const {
    AtenTensorHandle handle = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
        static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
        torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)), aoti_torch_device_type_cuda(), index_,
        &handle));
    return Tensor(handle);
  }
  Tensor channels_last(int64_t n, int64_t c, int64_t h, int64_t w, ScalarType dtype) const {
    return empty({n, c, h, w}, {h * w * c, 1, w * c, c}, dtype);
  }

  void* stream() const { return stream_; }
  const Device& device() const { return device_; }

 private:
  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
  Device device_;
  void* stream_ = nullptr;
};

void check_launch(const char* op, int error) {
  if (error != 0) {
    throw std::runtime_error(std::string("resnet_fused.") + op + ": the kernel did not start: " + error_text(error));
  }
}

void require_kernel(const ProjectionChecker& check, const char* argument, const Tensor& t) {
  const bool is_double = t.scalar_type() == ScalarType::Double;
  check.require(!is_double, argument, "float32, bfloat16 or float16", "float64");
}

const Launchers& launchers_for(ScalarType dtype, bool allow_tf32) {
  if (dtype == ScalarType::BFloat16) return bf16::launchers();
  if (dtype == ScalarType::Half) return f16::launchers();
  return allow_tf32 ? tf32::launchers() : f32::launchers();
}

Geometry geometry_of(const ProjectionSizes& s) {
  const auto as_int = [](int64_t v) { return static_cast<int>(v); };
  return {s.rows(),    as_int(s.C), as_int(s.K), as_int(s.H),         as_int(s.W),
          as_int(s.P), as_int(s.Q), as_int(s.stride[0]), as_int(s.stride[1])};
}

bool whole(const Tensor& t, int64_t extent) {
  return is_whole_chunks(t.const_data_ptr(), extent, static_cast<int>(t.element_size()));
}
bool whole(const OptionalTensor& t, int64_t extent) { return !t.has_value() || whole(*t, extent); }

// float32 and contiguous, held while a kernel is being started.
OptionalTensor as_floats(const OptionalTensor& t) {
  if (!t.has_value()) return t;
  const Tensor wide = t->scalar_type() == ScalarType::Float ? *t : torch::stable::to(*t, ScalarType::Float);
  return contiguous_table(wide);
}
const float* floats(const OptionalTensor& t) { return static_cast<const float*>(data_of(t)); }

std::tuple<Tensor, Tensor> projection_fwd(const Tensor& x_any, const Tensor& weight_any, const OptionalTensor& bias_any,
                                          std::vector<int64_t> stride, bool stats, const OptionalTensor& moments_any,
                                          const OptionalTensor& add_any, const OptionalTensor& add_moments_any,
                                          bool relu, bool allow_tf32) {
  const ProjectionChecker check("projection_fwd", kCUDA);
  const auto s = check_projection_fwd(check, x_any, weight_any, bias_any, stride, stats, moments_any, add_any,
                                      add_moments_any, relu);
  require_kernel(check, "x", x_any);
  const Call call(x_any);
  const Tensor x = dense(x_any), weight = dense(weight_any);
  const OptionalTensor bias = as_floats(bias_any), moments = as_floats(moments_any), add = dense(add_any);
  const OptionalTensor add_moments = as_floats(add_moments_any);
  const Tensor out = call.channels_last(s.N, s.K, s.P, s.Q, x.scalar_type());
  const Tensor partials = call.empty({stats ? s.tiles() : 0, 3, s.K}, {3 * s.K, s.K, 1}, ScalarType::Float);
  float* statistics = stats ? static_cast<float*>(partials.mutable_data_ptr()) : nullptr;
  const FwdArgs args{geometry_of(s),       x.const_data_ptr(),    weight.const_data_ptr(),
                     floats(bias),         out.mutable_data_ptr(), statistics,
                     floats(moments),      data_of(add),           floats(add_moments),
                     relu,                 whole(x, s.C),          whole(weight, s.C),
                     whole(out, s.K) && whole(add, s.K)};
  const int columns = choose_block_columns(tiles_of(s.rows(), 128), s.K, call.device());
  const Launchers& launchers = launchers_for(x.scalar_type(), allow_tf32);
  check_launch("projection_fwd", launchers.fwd(args, columns, call.device().shared_bytes, call.stream()));
  return {out, partials};
}

// The prologue that the tables ask for.
int prologue_of(const OptionalTensor& moments, const OptionalTensor& sums) {
  return !moments.has_value() ? kPlain : sums.has_value() ? kBatchStatistics : kScaled;
}

Tensor projection_dgrad(const Tensor& g_any, const OptionalTensor& y_any, const Tensor& weight_any,
                        const OptionalTensor& moments_any, const OptionalTensor& sums_any, std::vector<int64_t> size,
                        std::vector<int64_t> stride, const OptionalTensor& add_any, bool allow_tf32) {
  const ProjectionChecker check("projection_dgrad", kCUDA);
  const auto s = check_projection_dgrad(check, g_any, y_any, weight_any, moments_any, sums_any, size, stride, add_any);
  require_kernel(check, "g", g_any);
  const Call call(g_any);
  const Tensor g = dense(g_any), weight = dense(weight_any);
  const OptionalTensor y = sums_any.has_value() ? dense(y_any) : OptionalTensor(), add = dense(add_any);
  const OptionalTensor moments = as_floats(moments_any), sums = as_floats(sums_any);
  const Tensor dx = call.channels_last(s.N, s.C, s.H, s.W, g.scalar_type());
  const DgradArgs args{geometry_of(s),
                       g.const_data_ptr(),
                       data_of(y),
                       weight.const_data_ptr(),
                       floats(moments),
                       floats(sums),
                       dx.mutable_data_ptr(),
                       data_of(add),
                       prologue_of(moments, sums),
                       whole(g, s.K) && whole(y, s.K),
                       whole(weight, s.C),
                       whole(dx, s.C) && whole(add, s.C)};
  const int columns = choose_block_columns(tiles_of(s.rows(), 128), s.C, call.device());
  const Launchers& launchers = launchers_for(g.scalar_type(), allow_tf32);
  check_launch("projection_dgrad", launchers.dgrad(args, columns, call.device().shared_bytes, call.stream()));
  return dx;
}

std::tuple<Tensor, Tensor> projection_wgrad(const Tensor& g_any, const OptionalTensor& y_any, const Tensor& x_any,
                                            const OptionalTensor& moments_any, const OptionalTensor& sums_any,
                                            std::vector<int64_t> stride, ScalarType dtype, bool bias, bool allow_tf32) {
  const ProjectionChecker check("projection_wgrad", kCUDA);
  const auto s = check_projection_wgrad(check, g_any, y_any, x_any, moments_any, sums_any, stride, dtype);
  require_kernel(check, "x", x_any);
  const Call call(g_any);
  const Tensor g = dense(g_any), x = dense(x_any);
  const OptionalTensor y = sums_any.has_value() ? dense(y_any) : OptionalTensor();
  const OptionalTensor moments = as_floats(moments_any), sums = as_floats(sums_any);
  const Tensor dweight = call.empty({s.K, s.C, 1, 1}, {s.C, 1, 1, 1}, dtype);
  const Tensor dbias = call.empty({bias ? s.K : 0}, {1}, ScalarType::Float);
  const Geometry shape = geometry_of(s);
  const int element = static_cast<int>(x.element_size());
  const WgradPlan plan = choose_wgrad_plan(shape, element, y.has_value(), call.device());
  const int64_t part = s.K * s.C, parts = plan.splits > 1 ? plan.splits : 0;
  const Tensor workspace = call.empty({parts * (part + s.K)}, {1}, ScalarType::Float);
  float* partials = parts > 0 ? static_cast<float*>(workspace.mutable_data_ptr()) : nullptr;
  const WgradArgs args{shape,
                       g.const_data_ptr(),
                       data_of(y),
                       x.const_data_ptr(),
                       floats(moments),
                       floats(sums),
                       partials,
                       parts > 0 ? partials + parts * part : nullptr,
                       dweight.mutable_data_ptr(),
                       bias ? static_cast<float*>(dbias.mutable_data_ptr()) : nullptr,
                       prologue_of(moments, sums),
                       plan.splits,
                       dtype == ScalarType::Float,
                       whole(g, s.K) && whole(y, s.K),
                       whole(x, s.C),
                       whole(dweight, s.C)};
  const Launchers& launchers = launchers_for(x.scalar_type(), allow_tf32);
  const int limit = call.device().shared_bytes;
  check_launch("projection_wgrad", launchers.wgrad(args, plan.block_columns, limit, call.stream()));
  return {dweight, dbias};
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CUDA, m) {
  m.impl("projection_fwd", TORCH_BOX(&projection_fwd));
  m.impl("projection_dgrad", TORCH_BOX(&projection_dgrad));
  m.impl("projection_wgrad", TORCH_BOX(&projection_wgrad));
}

} // namespace resnet_fused::cuda
