// How a weight's gradient by Winograd, or of few channels, runs on the threads; see winograd_weight.h, narrow_weight.h.
#pragma once

#include "packed_product.h"

namespace resnet_fused::cpu {

// Of 32 channels Winograd is as fast.
inline bool takes_narrow_weight(const ConvArgs& c, const ConvKernels& own) {
  const bool few = c.channels == 16 && c.stride[0] == 1;
  return own.narrow_wgrad != nullptr && is_narrow(c) && (few || c.channels == kPictureChannels);
}

inline bool all_finished(const std::vector<char>& unfinished) {
  return std::none_of(unfinished.begin(), unfinished.end(), [](char c) { return c != 0; });
}

// (K, C * taps) of few channels, or nothing where a sum is not finite: each task has rows of the grid.
inline std::optional<Tensor> narrow_weight(ConvArgs& c, const ConvKernels& own) {
  constexpr int64_t kGradients = 128 * 1024; // bytes that a band has of them
  const int64_t gradients = std::max<int64_t>(1, kGradients / (c.out[1] * c.outputs * own.element)) * c.out[1];
  c.band = std::min(narrow_band_of(c, own), gradients);
  const int64_t rows = c.batch * c.out[0], points = rows * c.out[1], depth = c.filter[0] * c.filter[1] * c.channels;
  const int64_t count = finer(parts_of(rows, points * std::max(depth, c.outputs)), rows);
  Parts parts(flat(depth, c.outputs, points), count, ScalarType::Float, 0);
  std::vector<char> unfinished(count);
  for_parts(count, rows, [&](int64_t part, int64_t begin, int64_t end) {
    ProjectionTask task;
    bool is_unfinished = false;
    task.unfinished = &is_unfinished;
    task.rows[0] = begin;
    task.rows[1] = end;
    task.result = parts.weight_of(part);
    BandMemory::of_thread().reserve_narrow(c, own, task);
    own.narrow_wgrad(c, task);
    unfinished[part] = static_cast<char>(is_unfinished);
  });
  return all_finished(unfinished) ? std::optional<Tensor>(parts.sum()) : std::nullopt;
}

class WeightPatches {
 public:
  WeightPatches(ConvArgs& c, const ConvKernels& own)
      : c_(c), own_(own), rows_(c.batch * ((c.out[0] + 1) / 2)), across_((c.out[1] + 1) / 2) {}

  // (K, C * 9), or nothing where a result is not finite.
  std::optional<Tensor> run() {
    constexpr int64_t kOwnWeight = 128 * 128; // elements of dU that a task has for itself
    return c_.channels * c_.outputs <= kOwnWeight ? by_patches() : by_rows();
  }

 private:
  ProjectionSizes sizes() const { return flat(9 * c_.channels, c_.outputs, rows_ * across_ * 4); }
  int64_t work() const { return rows_ * across_ * 16 * std::max(c_.channels, c_.outputs); }

  ProjectionTask task_of(int64_t begin, int64_t end) const {
    ProjectionTask task;
    task.rows[0] = begin;
    task.rows[1] = end;
    task.workspace = workspace();
    return task;
  }

  // Each task has patches.
  std::optional<Tensor> by_patches() {
    constexpr int64_t kSmall = 64 * 64;
    const int64_t few = parts_of(rows_, work()), count = c_.channels * c_.outputs <= kSmall ? finer(few, rows_) : few;
    Parts parts(sizes(), count, ScalarType::Float, 0);
    std::vector<char> unfinished(count);
    for_parts(count, rows_, [&](int64_t part, int64_t begin, int64_t end) {
      ProjectionTask task = task_of(begin, end);
      task.result = parts.weight_of(part);
      run_task(task, unfinished[part]);
    });
    return finished(unfinished, parts.sum());
  }

  // Each task has rows of the weight.
  std::optional<Tensor> by_rows() {
    thread_local Buffer patches, gradients, products;
    const int64_t left = round_up(c_.outputs), right = round_up(c_.channels);
    constexpr int64_t kChunkBytes = 16 << 20, kPoints = 16;
    const int64_t fit = std::max<int64_t>(1, kChunkBytes / (kPoints * own_.element * across_ * (left + right)));
    const int64_t chunks = (rows_ + fit - 1) / fit, most = (rows_ + chunks - 1) / chunks;
    c_.patches = patches.of(kPoints * own_.element * most * across_ * right);
    c_.gradients = gradients.of(kPoints * own_.element * most * across_ * left);
    c_.products = chunks > 1 ? products.of(kPoints * own_.element * c_.outputs * right) : nullptr;
    const Tensor weight = empty({c_.outputs, 9 * c_.channels}, {9 * c_.channels, 1}, ScalarType::Float);
    const Cut cut{c_.outputs, kRowUnit, parts_of((c_.outputs + kRowUnit - 1) / kRowUnit, work())};
    std::vector<char> unfinished(cut.parts);
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      c_.chunk[0] = rows_ * chunk / chunks;
      c_.chunk[1] = rows_ * (chunk + 1) / chunks;
      const int64_t own = c_.chunk[1] - c_.chunk[0];
      for_parts(parts_of(own, work()), own, [&](int64_t, int64_t begin, int64_t end) {
        ProjectionTask task = task_of(c_.chunk[0] + begin, c_.chunk[0] + end);
        BandMemory::of_thread().reserve(c_, own_, task, std::max(c_.band, 4 * c_.out[1]));
        own_.winograd_weight_patches(c_, task);
      });
      for_parts(cut.parts, cut.parts, [&](int64_t part, int64_t, int64_t) {
        ProjectionTask task = task_of(0, 0);
        task.channels[0] = cut.begin(part);
        task.channels[1] = cut.begin(part + 1);
        task.result = weight.mutable_data_ptr();
        run_task(task, unfinished[part]);
      });
    }
    return finished(unfinished, weight);
  }

  void run_task(ProjectionTask& task, char& unfinished) const {
    bool is_unfinished = false;
    task.unfinished = &is_unfinished;
    BandMemory::of_thread().reserve_patches(c_, own_, task, own_.winograd_weight_elements(c_));
    own_.winograd_wgrad(c_, task);
    unfinished = static_cast<char>(is_unfinished);
  }

  static std::optional<Tensor> finished(const std::vector<char>& unfinished, const Tensor& weight) {
    return all_finished(unfinished) ? std::optional<Tensor>(weight) : std::nullopt;
  }

  static int64_t round_up(int64_t channels) { return (channels + 63) / 64 * 64; } // whole panels of any kind

  static constexpr int64_t kRowUnit = 16; // rows of dU: whole panels

  ConvArgs& c_;
  const ConvKernels& own_;
  int64_t rows_, across_;
};

} // namespace resnet_fused::cpu
