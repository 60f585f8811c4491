// Which tile and how many splits: pure functions of the shape and of the device.
#pragma once

#include <algorithm>
#include <cstdint>

#include "args.h"

namespace resnet_fused::cuda {

struct Device {
  int multiprocessors;
  int shared_bytes; // of one block, at most
};

// What tiles of 128 columns take, and every device from 8.0 on has.
constexpr int kWideShared = 99 * 1024;

struct WgradPlan {
  int block_columns;
  int splits;
};

inline int64_t tiles_of(int64_t size, int64_t block) { return (size + block - 1) / block; }

// Whether rows of `extent` elements from `data` on begin and end at multiples of 16 bytes.
inline bool is_whole_chunks(const void* data, int64_t extent, int element_bytes) {
  return (reinterpret_cast<uintptr_t>(data) | static_cast<uintptr_t>(extent * element_bytes)) % 16 == 0;
}

// 64 columns where 128 would not fit, would be half empty, or would leave multiprocessors without a block.
inline int choose_block_columns(int64_t row_tiles, int64_t columns, const Device& device) {
  const int64_t rest = columns % 128;
  if (device.shared_bytes < kWideShared || (rest > 0 && rest <= 64)) return 64;
  return row_tiles * tiles_of(columns, 128) < device.multiprocessors ? 64 : 128;
}

// Two blocks for every multiprocessor, as far as the partial sums, written and read once each in float32, stay
// below a 25th of the bytes of the operands; every split has two slices of 64 rows at least.
inline WgradPlan choose_wgrad_plan(const Geometry& s, int element_bytes, bool reads_y, const Device& device) {
  const bool narrow = device.shared_bytes < kWideShared || (s.C % 128 > 0 && s.C % 128 <= 64);
  WgradPlan plan{narrow ? 64 : 128, 1};
  const int64_t tiles = tiles_of(s.K, 128) * tiles_of(s.C, plan.block_columns);
  const int64_t operands = s.rows * element_bytes * (s.K * (reads_y ? 2 : 1) + s.C);
  const int64_t partials = static_cast<int64_t>(s.K) * s.C * 2 * 4;
  const int64_t wanted = tiles_of(2 * device.multiprocessors, tiles);
  const int64_t allowed = std::max<int64_t>(1, operands / 25 / partials);
  const int64_t available = std::max<int64_t>(1, s.rows / 128);
  plan.splits = static_cast<int>(std::min({wanted, allowed, available}));
  return plan;
}

} // namespace resnet_fused::cuda
