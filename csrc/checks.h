// Checks of op arguments. Every message names the op, the argument, what was expected and what came.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace resnet_fused {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline std::string dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Long:
      return "int64";
    default:
      return torch::headeronly::toString(dtype);
  }
}

inline std::string shape_name(std::initializer_list<int64_t> shape) {
  std::ostringstream text;
  text << "(";
  const char* separator = "";
  for (const int64_t size : shape) {
    text << separator << size;
    separator = ", ";
  }
  text << (shape.size() == 1 ? ",)" : ")");
  return text.str();
}

inline std::string shape_name(const Tensor& t) {
  std::ostringstream text;
  text << "(";
  for (int64_t d = 0; d < t.dim(); ++d) text << (d ? ", " : "") << t.size(d);
  text << (t.dim() == 1 ? ",)" : ")");
  return text.str();
}

inline bool is_float(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::Half ||
      dtype == ScalarType::BFloat16;
}

// The dtype that statistics and affines of `dtype` activations are computed in.
inline ScalarType opmath(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

enum Device : int { kCPU, kCUDA };

// The arguments of one call of one op.
class Checker {
 public:
  explicit Checker(const char* op, Device device = kCPU) : op_(op), device_(device) {}

  template <class Expected, class Got>
  void require(bool condition, const char* argument, const Expected& expected, const Got& got) const {
    if (condition) return;
    std::ostringstream text;
    text << "resnet_fused." << op_ << ": " << argument << ": expected " << expected << ", got " << got;
    throw std::runtime_error(text.str());
  }

  void device(const char* argument, const Tensor& t) const {
    if (device_ == kCPU) {
      require(t.is_cpu(), argument, "a CPU tensor", "a tensor on another device");
      return;
    }
    require(t.is_cuda(), argument, "a CUDA tensor", "a tensor on another device");
    const int32_t index = t.get_device_index();
    if (index_ < 0) index_ = index;
    require(index == index_, argument, "a tensor on cuda:" + std::to_string(index_), "cuda:" + std::to_string(index));
  }

  void dtype(const char* argument, const Tensor& t, ScalarType expected) const {
    if (t.scalar_type() != expected) require(false, argument, dtype_name(expected), dtype_name(t.scalar_type()));
  }

  void shape(const char* argument, const Tensor& t, std::initializer_list<int64_t> expected) const {
    bool same = t.dim() == static_cast<int64_t>(expected.size());
    int64_t d = 0;
    for (const int64_t size : expected) same = same && t.size(d++) == size;
    if (!same) require(false, argument, "shape " + shape_name(expected), "shape " + shape_name(t));
  }

  // An (N, C, H, W) tensor of a float dtype with at least one channel.
  void activation(const char* argument, const Tensor& t) const {
    device(argument, t);
    if (!is_float(t.scalar_type())) {
      require(false, argument, "float32, bfloat16, float16 or float64", dtype_name(t.scalar_type()));
    }
    if (t.dim() != 4 || t.size(1) < 1) {
      require(false, argument, "shape (N, C, H, W) with C >= 1", "shape " + shape_name(t));
    }
  }

  // The same device, dtype and shape as the activation `y`.
  void like(const char* argument, const Tensor& t, const Tensor& y) const {
    device(argument, t);
    dtype(argument, t, y.scalar_type());
    shape(argument, t, {y.size(0), y.size(1), y.size(2), y.size(3)});
  }
  void like(const char* argument, const OptionalTensor& t, const Tensor& y) const {
    if (t.has_value()) like(argument, *t, y);
  }

  // Per-channel values in opmath, one row of `channels` for each kind.
  void table(const char* argument, const Tensor& t, int64_t rows, int64_t channels, ScalarType expected) const {
    device(argument, t);
    dtype(argument, t, expected);
    shape(argument, t, {rows, channels});
  }

  // A parameter or buffer of a batch norm: (C,), any float dtype.
  void vector(const char* argument, const Tensor& t, int64_t channels) const {
    device(argument, t);
    if (!is_float(t.scalar_type())) require(false, argument, "a float dtype", dtype_name(t.scalar_type()));
    shape(argument, t, {channels});
  }
  void vector(const char* argument, const OptionalTensor& t, int64_t channels) const {
    if (t.has_value()) vector(argument, *t, channels);
  }

  void pair(const char* argument, const std::vector<int64_t>& values, int64_t minimum) const {
    if (values.size() == 2 && values[0] >= minimum && values[1] >= minimum) return;
    std::ostringstream got;
    for (const int64_t value : values) got << value << " ";
    require(false, argument, "two integers >= " + std::to_string(minimum), got.str());
  }

 private:
  const char* op_;
  Device device_;
  mutable int32_t index_ = -1; // of the first tensor's device, CUDA
};

} // namespace resnet_fused
