// Blocks of rows of a projection, and the matrix products over them.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/device.h>

#include <memory>

#include "../projection_checks.h"
#include "host.h"

namespace resnet_fused::cpu {

constexpr int64_t kTileRows = 128;

// A matrix on memory of someone else's, its rows `row` elements apart and its columns `column`.
inline Tensor view(void* data, int64_t rows, int64_t columns, int64_t row, int64_t column, ScalarType dtype) {
  const torch::stable::Device device(torch::headeronly::DeviceType::CPU);
  return torch::stable::from_blob(data, {rows, columns}, {row, column}, device, dtype);
}
inline Tensor matrix(void* data, int64_t rows, int64_t columns, ScalarType dtype) {
  return view(data, rows, columns, columns, 1, dtype);
}
// The transpose of matrix(data, rows, columns).
inline Tensor transposed(void* data, int64_t rows, int64_t columns, ScalarType dtype) {
  return view(data, columns, rows, 1, columns, dtype);
}

// out = a * b, or out += a * b.
inline void multiply(const Tensor& out, const Tensor& a, const Tensor& b, bool accumulate = false) {
  if (accumulate) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(out.get(), out.get(), a.get(), b.get(), 1.0, 1.0));
  } else {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()));
  }
}

// Scratch rows of one thread, in opmath.
class Scratch {
 public:
  explicit Scratch(int64_t element) : element_(element) {}

  void* get(int which, int64_t rows, int64_t columns) {
    const auto bytes = static_cast<size_t>(rows * columns * element_);
    if (bytes_[which] < bytes) {
      memory_[which].reset(new char[bytes]);
      bytes_[which] = bytes;
    }
    return memory_[which].get();
  }

 private:
  int64_t element_;
  std::unique_ptr<char[]> memory_[2];
  size_t bytes_[2] = {0, 0};
};

// One operand of a projection with `columns` channels: its kernel arguments and per-channel constants.
class Block {
 public:
  Block(const Tensor& t, const ProjectionSizes& s, int64_t columns, int planes)
      : isa(kernels()),
        dtype(dtype_of(t)),
        element(t.element_size()),
        is_wide(t.scalar_type() == opmath(t.scalar_type())) {
    const int64_t lanes = isa.vector_bytes / opmath_bytes();
    args.channels = columns;
    args.plane = (columns + lanes - 1) / lanes * lanes;
    constants_.resize(planes * args.plane * opmath_bytes());
    args.constants = constants_.data();
    args.in[0] = s.H;
    args.in[1] = s.W;
    args.out[0] = s.P;
    args.out[1] = s.Q;
    args.stride[0] = s.stride[0];
    args.stride[1] = s.stride[1];
  }

  void set_constant(int plane, int64_t channel, double value) {
    const int64_t i = plane * args.plane + channel;
    if (dtype == kFloat64) {
      reinterpret_cast<double*>(constants_.data())[i] = value;
    } else {
      reinterpret_cast<float*>(constants_.data())[i] = static_cast<float>(value);
    }
  }

  // Row `index` of the tensor as a matrix.
  void* row(const Tensor& t, int64_t index) const {
    return static_cast<char*>(t.mutable_data_ptr()) + index * args.channels * element;
  }

  // The tensor is what the kernel reads (gather, gradient) or writes (finish, scatter).
  void run(const ProjectionKernel* kernel, const Tensor& t, void* product, int64_t begin, int64_t end,
           double* acc = nullptr) const {
    ProjectionArgs own = args;
    own.source = own.result = t.mutable_data_ptr();
    own.product = product;
    kernel[dtype](own, begin, end, acc);
  }

  const Kernels& isa;
  const DType dtype;
  const int64_t element;
  const bool is_wide; // stored in opmath: products may be written in place
  ProjectionArgs args;

 private:
  int64_t opmath_bytes() const { return dtype == kFloat64 ? 8 : 4; }

  std::vector<char> constants_;
};

// The weight in opmath: itself, or a converted copy.
class Weight {
 public:
  Weight(const Tensor& weight, const ProjectionSizes& s)
      : K_(s.K), C_(s.C), wide_(opmath(weight.scalar_type())), held_(weight) {
    if (weight.scalar_type() != wide_) held_ = torch::stable::to(weight, wide_);
  }
  Tensor plain() const { return matrix(held_.mutable_data_ptr(), K_, C_, wide_); }
  Tensor transposed() const { return cpu::transposed(held_.mutable_data_ptr(), K_, C_, wide_); }

 private:
  int64_t K_, C_;
  ScalarType wide_;
  Tensor held_;
};

// Rows of a block: whole tiles of statistics, and few enough for both of its matrices to stay in cache.
inline int64_t block_rows(const ProjectionSizes& s) {
  constexpr int64_t kCacheElements = 128 * 1024, kMost = 1024;
  return std::clamp(kCacheElements / (s.C + s.K) / kTileRows * kTileRows, kTileRows, kMost);
}

// Calls run(begin, end, scratch) for every block of rows, in parallel.
template <class Run>
void for_blocks(const ProjectionSizes& s, const Run& run) {
  const int64_t rows = s.rows(), block = block_rows(s), blocks = (rows + block - 1) / block;
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t first, int64_t last) {
    Scratch scratch(sizeof(double));
    for (int64_t i = first; i < last; ++i) run(i * block, std::min(rows, (i + 1) * block), scratch);
  });
}

// Partial sums of dweight and dbias, one for each thread, added in their order.
class Parts {
 public:
  // `plane`: doubles of the sums of a part, 0 where they are not wanted.
  Parts(const ProjectionSizes& s, ScalarType wide, int64_t plane)
      : s_(s), wide_(wide), plane_(plane), blocks_((s.rows() + block_rows(s) - 1) / block_rows(s)) {
    const int64_t threads = torch::stable::get_num_threads();
    count_ = std::max<int64_t>(1, std::min(threads, blocks_));
    for (int64_t part = 0; part < count_; ++part) sums_.push_back(empty({s.K, s.C}, {s.C, 1}, wide));
    if (blocks_ == 0) torch::stable::zero_(sums_[0]);
    acc_.resize(count_ * plane);
  }

  // Calls run(dw, acc, is_first, begin, end, scratch) for every block of rows; a part's blocks come in order.
  template <class Run>
  void for_blocks(const Run& run) {
    const int64_t block = block_rows(s_);
    for_parts(count_, blocks_, [&](int64_t part, int64_t first, int64_t last) {
      Scratch scratch(sizeof(double));
      for (int64_t i = first; i < last; ++i) {
        double* acc = plane_ > 0 ? acc_.data() + part * plane_ : nullptr;
        run(sums_[part], acc, i == first, i * block, std::min(s_.rows(), (i + 1) * block), scratch);
      }
    });
  }

  // (K, C, 1, 1) in `dtype`.
  Tensor weight(ScalarType dtype) {
    for (int64_t part = 1; part < count_; ++part) add(sums_[0], sums_[part]);
    const Tensor whole = torch::stable::view(sums_[0], {s_.K, s_.C, 1, 1});
    return dtype == wide_ ? whole : torch::stable::to(whole, dtype);
  }

  // (K,), or (0,) where they are not wanted.
  Tensor bias_sums(bool wanted) const {
    const Tensor sums = empty({wanted ? s_.K : 0}, {1}, wide_);
    const Table table(sums);
    for (int64_t k = 0; k < s_.K && wanted; ++k) {
      double sum = 0;
      for (int64_t part = 0; part < count_; ++part) sum += acc_[part * plane_ + k];
      table.set(0, k, sum);
    }
    return sums;
  }

 private:
  void add(const Tensor& into, const Tensor& from) const {
    const int64_t count = s_.K * s_.C, parts = parts_of(count, count);
    for_parts(parts, count, [&](int64_t, int64_t begin, int64_t end) {
      wide_ == ScalarType::Double ? add_as<double>(into, from, begin, end) : add_as<float>(into, from, begin, end);
    });
  }

  template <class T>
  static void add_as(const Tensor& into, const Tensor& from, int64_t begin, int64_t end) {
    T* to = static_cast<T*>(into.mutable_data_ptr());
    const T* values = static_cast<const T*>(from.const_data_ptr());
    for (int64_t i = begin; i < end; ++i) to[i] += values[i];
  }

  ProjectionSizes s_;
  ScalarType wide_;
  int64_t plane_, blocks_, count_ = 1;
  std::vector<Tensor> sums_;
  std::vector<double> acc_;
};

} // namespace resnet_fused::cpu
