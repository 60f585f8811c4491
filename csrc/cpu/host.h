// What the host side of the CPU ops shares: dense channels_last tensors, tiled constants, threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <numeric>
#include <vector>

#include "../checks.h"
#include "../layout.h"
#include "activation_memory.h"
#include "dispatch.h"

namespace resnet_fused::cpu {

// Below this many elements per thread a second thread costs more than it brings.
constexpr int64_t kElementsPerThread = 16384;

inline DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::BFloat16:
      return kBFloat16;
    case ScalarType::Half:
      return kFloat16;
    case ScalarType::Double:
      return kFloat64;
    default:
      return kFloat32;
  }
}

inline Tensor empty(std::initializer_list<int64_t> sizes, std::initializer_list<int64_t> strides, ScalarType dtype) {
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(sizes.size()), sizes.begin(), strides.begin(),
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)), aoti_torch_device_type_cpu(), 0,
      &handle));
  return Tensor(handle);
}

inline Tensor empty_table(int64_t rows, int64_t channels, ScalarType dtype) {
  return empty({rows, channels}, {channels, 1}, dtype);
}

inline Tensor empty_channels_last(int64_t n, int64_t c, int64_t h, int64_t w, ScalarType dtype) {
  const int64_t sizes[] = {n, c, h, w}, strides[] = {h * w * c, 1, w * c, c};
  const int64_t bytes = n * c * h * w * (dtype == ScalarType::Double ? 8 : dtype == ScalarType::Float ? 4 : 2);
  if (bytes < kLeastKept || !keeps_activations()) return empty({n, c, h, w}, {h * w * c, 1, w * c, c}, dtype);
  const ActivationMemory memory = take_activation(bytes);
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(torch_from_blob(
      memory.data, 4, sizes, strides, 0, torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
      aoti_torch_device_type_cpu(), -1, &handle, aoti_torch_layout_strided(), nullptr, 0, give_back_activation,
      memory.context));
  return Tensor(handle);
}

inline Tensor empty_channels_last_like(const Tensor& t) {
  return empty_channels_last(t.size(0), t.size(1), t.size(2), t.size(3), t.scalar_type());
}

// An activation as rows of `width` elements, a multiple of C chosen so that vectors are whole and rows
// long enough to hide the latency of the accumulators.
struct Tiling {
  int64_t channels, total, lanes, width, plane;

  Tiling(const Tensor& y, const Kernels& isa) : Tiling(y, isa, y.size(1)) {
    constexpr int64_t kShortest = 128, kLongest = 2048;
    const int64_t tiled = std::lcm(channels, lanes);
    if (tiled <= kLongest) width = tiled;
    width *= (kShortest + width - 1) / width;
    if (width > total) width = channels;
    plane = whole_vectors(width);
  }

  // Not tiled: the channels of one pixel.
  static Tiling of_pixel(const Tensor& y, const Kernels& isa) { return Tiling(y, isa, y.size(1)); }

  int64_t whole_rows() const { return total / width; }

 private:
  Tiling(const Tensor& y, const Kernels& isa, int64_t row)
      : channels(y.size(1)),
        total(y.numel()),
        lanes(isa.vector_bytes / (y.scalar_type() == ScalarType::Double ? 8 : 4)),
        width(row),
        plane(whole_vectors(row)) {}

  int64_t whole_vectors(int64_t n) const { return (n + lanes - 1) / lanes * lanes; }
};

// Planes of per-column values in opmath, tiled from per-channel tables.
class Constants {
 public:
  explicit Constants(const Tiling& tiling, bool is_double)
      : tiling_(tiling), is_double_(is_double), bytes_(kPlanes * tiling.plane * (is_double ? 8 : 4)) {}

  // Fills planes [first, first + rows.size()) with the given rows of a contiguous (R, C) table.
  void fill(int first, const Tensor& table, std::initializer_list<int> rows) {
    const Tensor contiguous = contiguous_table(table);
    for (const int row : rows) {
      is_double_ ? fill_row<double>(first++, contiguous, row) : fill_row<float>(first++, contiguous, row);
    }
  }
  void fill_affine(int first, const Tensor& moments) { fill(first, moments, {0, 2, 3}); }

  const void* data() const { return bytes_.data(); }

 private:
  template <class T>
  void fill_row(int plane, const Tensor& table, int row) {
    const T* values = static_cast<const T*>(table.const_data_ptr()) + row * tiling_.channels;
    T* out = reinterpret_cast<T*>(bytes_.data()) + plane * tiling_.plane;
    for (int64_t j = 0; j < tiling_.width; j += tiling_.channels) std::copy_n(values, tiling_.channels, out + j);
  }

  const Tiling& tiling_;
  bool is_double_;
  std::vector<char> bytes_;
};

// A contiguous per-channel table in opmath, read and written as double.
class Table {
 public:
  explicit Table(const Tensor& t)
      : data_(t.mutable_data_ptr()), channels_(t.size(t.dim() - 1)), is_double_(t.scalar_type() == ScalarType::Double) {}

  double get(int64_t row, int64_t channel) const {
    const int64_t i = row * channels_ + channel;
    return is_double_ ? static_cast<const double*>(data_)[i] : static_cast<const float*>(data_)[i];
  }
  void set(int64_t row, int64_t channel, double value) const {
    const int64_t i = row * channels_ + channel;
    if (is_double_) {
      static_cast<double*>(data_)[i] = value;
    } else {
      static_cast<float*>(data_)[i] = static_cast<float>(value);
    }
  }
  int64_t channels() const { return channels_; }

 private:
  void* data_;
  int64_t channels_;
  bool is_double_;
};

// Sums (2, C) of g and of g * xhat, from sums of g and of g * (y - mean) by channel.
template <class SumG, class SumGD>
Tensor sums_table(const Tensor& moments, const SumG& sum_g, const SumGD& sum_gd) {
  const Tensor sums = empty_table(2, moments.size(1), moments.scalar_type());
  const Tensor dense_moments = contiguous_table(moments);
  const Table in(dense_moments), out(sums);
  for (int64_t c = 0; c < out.channels(); ++c) {
    out.set(0, c, sum_g(c));
    out.set(1, c, sum_gd(c) * in.get(1, c));
  }
  return sums;
}

// How many static parts `units` of work over `elements` elements are cut into.
inline int64_t parts_of(int64_t units, int64_t elements) {
  const int64_t threads = torch::stable::get_num_threads();
  return std::max<int64_t>(1, std::min({threads, units, elements / kElementsPerThread}));
}

// More parts than threads, of `parts` that are long enough for it: a thread on a core that others use too gets fewer.
constexpr int64_t kFiner = 4;
inline int64_t finer(int64_t parts, int64_t most) { return parts > 1 ? std::clamp(parts * kFiner, parts, most) : 1; }

// Calls run(part, begin, end) for a fixed partition of [0, units): the same for any schedule of threads. Of more parts
// than threads each takes the next one when it is done, so that a slower core gets fewer.
template <class Run>
void for_parts(int64_t parts, int64_t units, const Run& run) {
  const int64_t threads = std::min<int64_t>(parts, torch::stable::get_num_threads());
  std::atomic<int64_t> next{threads};
  const auto run_part = [&](int64_t part) { run(part, units * part / parts, units * (part + 1) / parts); };
  torch::stable::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
    for (int64_t part = first; part < last; ++part) run_part(part);
    for (int64_t part = next++; part < parts; part = next++) run_part(part);
  });
}

} // namespace resnet_fused::cpu
