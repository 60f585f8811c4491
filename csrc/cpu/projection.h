// The arguments of the projection's kernels, and how threads share its matrix products.
#pragma once

#include <cmath>
#include <cstdlib>
#include <memory>
#include <new>

#include "../projection_checks.h"
#include "host.h"
#include "moments.h"

namespace resnet_fused::cpu {

// Rows of a part where there are no tiles of statistics: whole panels, of any instruction set.
constexpr int64_t kPanelUnit = 60;

// Whether a result of rows of `channels` is stored past the caches: where it is more than they hold, and its vectors are
// aligned.
inline bool is_streamed(const Tensor& t, int64_t channels) {
  constexpr int64_t kCached = 8 << 20, kLine = 64;
  const auto element = static_cast<int64_t>(t.element_size());
  return t.numel() * element > kCached && channels * element % kLine == 0 &&
      reinterpret_cast<uintptr_t>(t.const_data_ptr()) % kLine == 0;
}

// The packed blocks of one thread, kept for its next call.
inline void* workspace() {
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  thread_local std::unique_ptr<void, Free> memory;
  if (memory == nullptr) {
    memory.reset(std::aligned_alloc(4096, kWorkspaceBytes));
    if (memory == nullptr) throw std::bad_alloc();
  }
  return memory.get();
}

// Kernel arguments, and the constants of K channels that they point to.
class ProjectionCall {
 public:
  ProjectionCall(const Tensor& t, const ProjectionSizes& s, int planes)
      : isa(kernels()), dtype(dtype_of(t)), element_(dtype == kFloat64 ? 8 : 4) {
    const int64_t lanes = isa.vector_bytes / element_;
    args.plane = (s.K + lanes - 1) / lanes * lanes;
    constants_.resize((planes * args.plane + lanes) * element_); // a vector may begin at any channel
    args.constants = constants_.data();
    args.batch = s.N;
    args.channels = s.C;
    args.outputs = s.K;
    args.in[0] = s.H;
    args.in[1] = s.W;
    args.out[0] = s.P;
    args.out[1] = s.Q;
    args.stride[0] = s.stride[0];
    args.stride[1] = s.stride[1];
    args.plain_moments = plain_moments;
  }

  // Planes [first, ...) from rows of a table (R, K); left zero without one.
  void fill(int first, const OptionalTensor& table, std::initializer_list<int> rows) {
    if (!table.has_value()) return;
    const Tensor dense_table = contiguous_table(*table);
    const Table in(dense_table);
    for (const int row : rows) {
      for (int64_t k = 0; k < in.channels(); ++k) set_constant(first, k, in.get(row, k));
      ++first;
    }
  }

  void fill_bias(const OptionalTensor& bias, ScalarType wide) {
    if (!bias.has_value()) return;
    const Tensor converted = torch::stable::contiguous(torch::stable::to(*bias, wide));
    const Table in(converted);
    for (int64_t k = 0; k < in.channels(); ++k) set_constant(kBias, k, in.get(0, k));
  }

  // Coefficients of dy = a * g + b * (y - mean) + c, or of dy = a * g.
  void fill_gradient(const OptionalTensor& moments, const OptionalTensor& sums) {
    args.prologue = !moments.has_value() ? kPlain : !sums.has_value() ? kScaled : kBatchStatistics;
    if (args.prologue == kPlain) return;
    const Tensor dense_moments = contiguous_table(*moments);
    const Table m(dense_moments);
    for (int64_t k = 0; k < m.channels(); ++k) set_constant(kFactorG, k, m.get(2, k));
    if (args.prologue == kScaled) return;
    const Tensor dense_sums = contiguous_table(*sums);
    const Table s(dense_sums);
    for (int64_t k = 0; k < m.channels(); ++k) {
      const double scale = m.get(2, k), inverse = m.get(4, k);
      set_constant(kFactorY, k, -scale * m.get(1, k) * s.get(1, k) * inverse);
      set_constant(kMeanY, k, m.get(0, k));
      set_constant(kConstant, k, -scale * s.get(0, k) * inverse);
    }
  }

  // What is written, and whether past the caches.
  void set_result(const Tensor& t, int64_t channels) { stream(args, t, channels); }

  static void stream(ProjectionArgs& args, const Tensor& t, int64_t channels) {
    args.result = t.mutable_data_ptr();
    args.streamed = is_streamed(t, channels);
  }

  const Kernels& isa;
  const DType dtype;
  ProjectionArgs args;

 private:
  void set_constant(int plane, int64_t channel, double value) {
    const int64_t i = plane * args.plane + channel;
    if (dtype == kFloat64) {
      reinterpret_cast<double*>(constants_.data())[i] = value;
    } else {
      reinterpret_cast<float*>(constants_.data())[i] = static_cast<float>(value);
    }
  }

  int64_t element_;
  std::vector<char> constants_;
};

// One dimension of a product, cut into `parts` of whole units: even ones, or for `tapered` threads such that get shorter.
struct Cut {
  int64_t length, unit, parts, tapered = 0;

  int64_t units() const { return (length + unit - 1) / unit; }
  int64_t begin(int64_t part) const {
    if (tapered == 0 || part >= parts) return std::min(length, units() * part / parts * unit);
    const int64_t round = part / tapered, size = kEnds[round + 1] - kEnds[round];
    const int64_t at = kEnds[round] * tapered + part % tapered * size;
    return std::min(length, units() * at / (kWhole * tapered) * unit);
  }
  int64_t part_of(int64_t position) const {
    int64_t part = 0;
    while (part + 1 < parts && begin(part + 1) <= position) ++part;
    return part;
  }
  int64_t longest() const { return std::min(length, (units() + parts - 1) / parts * unit); }

  // A thread on a core that others use too gets fewer parts than the others, who wait at the end for one part at most.
  Cut finer(int64_t most) const {
    constexpr int64_t kEven = 8;
    Cut cut = *this;
    if (units() >= kWhole * parts && kRounds * parts <= most) {
      cut.tapered = parts;
      cut.parts = kRounds * parts;
    } else {
      cut.parts = std::clamp(std::min(kEven * parts, most), parts, units());
    }
    return cut;
  }

 private:
  static constexpr int64_t kWhole = 16, kRounds = 6;
  static constexpr int64_t kEnds[kRounds + 1] = {0, 6, 10, 12, 14, 15, kWhole}; // of a thread's parts
};

struct Shares {
  Cut rows, channels;

  int64_t count() const { return rows.parts * channels.parts; }

  // More parts of rows than threads, of some 10 us at least.
  Shares finer(int64_t multiply_adds) const {
    constexpr int64_t kLeast = 1 << 21;
    return {rows.finer(multiply_adds / kLeast), channels};
  }

  // Calls run(task) for every part, in parallel; a part is a row part and a channel part of it.
  template <class Run>
  void for_each(const Run& run) const {
    for_parts(count(), count(), [&](int64_t part, int64_t, int64_t) {
      const int64_t r = part / channels.parts, c = part % channels.parts;
      ProjectionTask task;
      task.rows[0] = rows.begin(r);
      task.rows[1] = rows.begin(r + 1);
      task.channels[0] = channels.begin(c);
      task.channels[1] = channels.begin(c + 1);
      task.workspace = workspace();
      run(task, r);
    });
  }
};

// The cheapest shares for `threads`: cost(shares) of their slowest, in multiply-adds.
template <class Cost>
Shares shares_of(Cut rows, Cut channels, int64_t multiply_adds, const Cost& cost) {
  constexpr int64_t kLeast = 1 << 18; // for a second thread to bring something
  const int64_t most = std::max<int64_t>(1, multiply_adds / kLeast);
  const int64_t threads = std::min(torch::stable::get_num_threads() + int64_t{0}, most);
  Shares best{rows, channels};
  double least = -1;
  for (int64_t parts = 1; parts <= threads; ++parts) {
    Shares s{rows, channels};
    s.channels.parts = std::max<int64_t>(1, std::min(parts, channels.units()));
    s.rows.parts = std::max<int64_t>(1, std::min(threads / parts, rows.units()));
    const double own = cost(s);
    if (least >= 0 && own >= least) continue;
    least = own;
    best = s;
  }
  return best;
}

// Of the forward and of dgrad: every channel part reads all of its rows, every row part all of its channels' weight.
inline Shares product_shares(const ProjectionSizes& s, int64_t channels, int64_t row_unit) {
  constexpr int64_t kChannels = 64;
  return shares_of({s.rows(), row_unit, 1}, {channels, kChannels, 1}, s.rows() * s.C * s.K, [](const Shares& shares) {
    const auto rows = static_cast<double>(shares.rows.longest()), own = static_cast<double>(shares.channels.longest());
    constexpr double kRow = 20, kChannel = 10; // multiply-adds that reading and packing one element cost
    return rows * own + rows * kRow + own * kChannel;
  });
}

// Of wgrad: row parts sum into a dweight each, of which there are more only where they are small.
inline Shares weight_shares(const ProjectionSizes& s) {
  constexpr int64_t kChannels = 16, kSmall = 1 << 16;
  const auto C = static_cast<double>(s.C), weight = static_cast<double>(s.K) * C;
  const int64_t work = s.rows() * s.C * s.K;
  const Shares shares = shares_of({s.rows(), kTileRows, 1}, {s.K, kChannels, 1}, work, [=](const Shares& shares) {
    const auto rows = static_cast<double>(shares.rows.longest()), own = static_cast<double>(shares.channels.longest());
    constexpr double kX = 10, kDy = 20, kPart = 30;
    const double parts = shares.rows.parts > 1 ? static_cast<double>(shares.rows.parts) : 0;
    return rows * own * C + rows * (C * kX + own * kDy) + weight * kPart * parts / static_cast<double>(shares.count());
  });
  return shares.rows.parts > 1 && s.K * s.C <= kSmall ? shares.finer(work) : shares;
}

// Partial sums of dweight and dbias, one of each for each part of the rows, added in their order.
class Parts {
 public:
  Parts(const ProjectionSizes& s, int64_t count, ScalarType wide, int64_t plane) : s_(s), wide_(wide), plane_(plane) {
    for (int64_t part = 0; part < count; ++part) sums_.push_back(empty({s.K, s.C}, {s.C, 1}, wide));
    acc_.resize(count * plane);
  }

  void* weight_of(int64_t part) const { return sums_[part].mutable_data_ptr(); }
  double* bias_of(int64_t part) { return plane_ > 0 ? acc_.data() + part * plane_ : nullptr; }

  // (K, C), the sum of the parts.
  Tensor sum() const {
    for (size_t part = 1; part < sums_.size(); ++part) add(sums_[0], sums_[part]);
    return sums_[0];
  }

  // (K, C, 1, 1) in `dtype`.
  Tensor weight(ScalarType dtype) const {
    const Tensor whole = torch::stable::view(sum(), {s_.K, s_.C, 1, 1});
    return dtype == wide_ ? whole : torch::stable::to(whole, dtype);
  }

  // (K,), or (0,) where they are not wanted.
  Tensor bias_sums(bool wanted) const {
    const Tensor sums = empty({wanted ? s_.K : 0}, {1}, wide_);
    const Table table(sums);
    for (int64_t k = 0; k < s_.K && wanted; ++k) {
      double sum = 0;
      for (size_t part = 0; part < sums_.size(); ++part) sum += acc_[part * plane_ + k];
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
  int64_t plane_;
  std::vector<Tensor> sums_;
  std::vector<double> acc_;
};

} // namespace resnet_fused::cpu
