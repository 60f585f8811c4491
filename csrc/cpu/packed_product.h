// How a packed convolution runs: its memory, its filters in panels, and its parts on the threads.
#pragma once

#include <cstdlib>

#include "projection.h"

namespace resnet_fused::cpu {

// Bytes of the images that a band holds: what they are read by is in the caches with them.
inline int64_t band_bytes(const Kernels& isa) { return (isa.vector_bytes == 64 ? 768 : 192) * 1024; }

// Rows of a tile of statistics: whole panels.
constexpr int64_t kStatisticsRows = 120;

// Memory that is kept for a thread's next call.
class Buffer {
 public:
  void* of(int64_t bytes) {
    if (bytes > size_) {
      constexpr int64_t kPage = 4096;
      size_ = (bytes + kPage - 1) / kPage * kPage;
      memory_.reset();
      memory_.reset(std::aligned_alloc(kPage, size_));
      if (memory_ == nullptr) throw std::bad_alloc();
    }
    return memory_.get();
  }

 private:
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  std::unique_ptr<void, Free> memory_;
  int64_t size_ = 0;
};

// The filters in panels, by all threads; Winograd's are 16 of them, made of what they are as well.
inline void pack_filters(ConvArgs& c, const Kernels& isa, bool transformed) {
  thread_local Buffer memory;
  constexpr int64_t kTransformed = 16;
  const int64_t panels = (c.outputs + isa.panel_columns - 1) / isa.panel_columns;
  const int64_t taps = c.filter[0] * c.filter[1] + (transformed ? kTransformed : 0);
  const int64_t elements = taps * c.channels * panels * isa.panel_columns;
  c.packed = memory.of(elements * 4);
  const ConvArgs& args = c;
  for_parts(parts_of(panels, elements), panels, [&](int64_t, int64_t begin, int64_t end) {
    transformed ? isa.winograd_pack(args, begin, end) : isa.conv_pack(args, begin, end);
  });
}

// Whether Winograd's products are enough fewer to pay for its transforms, of the filters above all.
inline bool takes_winograd(const ConvArgs& c, const Kernels& isa) {
  constexpr int64_t kFewest = 32, kSaved = 2400; // channels, and multiplications of each pair of them
  const bool fits = c.filter[0] == 3 && c.filter[1] == 3 && c.stride[0] == 1 && c.stride[1] == 1 &&
      c.grid_step[0] == 1 && c.grid_step[1] == 1 && c.channels <= isa.deepest;
  const int64_t patches = (c.out[0] + 1) / 2 * ((c.out[1] + 1) / 2);
  const int64_t saved = c.batch * (9 * c.out[0] * c.out[1] - 16 * patches);
  return fits && c.channels >= kFewest && c.outputs >= kFewest && saved >= kSaved;
}

// The memory of a thread's bands.
class BandMemory {
 public:
  // For `points` of a grid.
  void reserve(const ConvArgs& c, ProjectionTask& task, int64_t least = 0) {
    const int64_t per_image = std::max<int64_t>(0, c.filter[0] - c.stride[0]);
    const int64_t points = std::min(std::max(c.band, least), task.rows[1] - task.rows[0]) + 128; // as Blocks rounds them
    const int64_t rows = (points / c.out[1] + 2) * c.stride[0] + (points / (c.out[0] * c.out[1]) + 2) * per_image +
        c.filter[0];
    const int64_t pitch = ((c.out[1] - 1) * c.stride[1] + c.filter[1]) * c.channels;
    constexpr int64_t kSpare = 256; // elements, that whole vectors are read and written past the end
    task.band = floats_.of((rows * pitch + kSpare) * 4);
    task.offsets = static_cast<int32_t*>(offsets_.of(points * 4));
  }

  void reserve_patches(const ConvArgs& c, const Kernels& isa, ProjectionTask& task) {
    constexpr int64_t kRows = 64; // at most, of the images that a group of patches makes
    reserve(c, task, kRows * c.out[1]);
    task.patches = patches_.of(isa.winograd_elements(c, task.channels[1] - task.channels[0]) * 4);
  }

  static BandMemory& of_thread() {
    thread_local BandMemory memory;
    return memory;
  }

 private:
  Buffer floats_, offsets_, patches_;
};

// How many points a band has, or 0 where the images are read in place.
inline int64_t band_of(const ConvArgs& c, const Kernels& isa) {
  const bool in_place = c.filter[0] == 1 && c.filter[1] == 1 && c.stride[0] == 1 && c.stride[1] == 1 &&
      c.before[0] == 0 && c.before[1] == 0 && c.in[0] == c.out[0] && c.in[1] == c.out[1];
  if (in_place) return 0;
  const int64_t row_bytes = ((c.out[1] - 1) * c.stride[1] + c.filter[1]) * c.channels * 4;
  const int64_t rows = std::max<int64_t>(1, (band_bytes(isa) / row_bytes - c.filter[0]) / c.stride[0]);
  return rows * c.out[1];
}

// One set of accumulators for each part.
using Sums = std::vector<std::vector<double>>;

// A product of (rows, depth) by (depth, outputs), for those who share it out.
inline ProjectionSizes flat(int64_t depth, int64_t outputs, int64_t rows) {
  return {1, depth, rows, 1, outputs, rows, 1, {1, 1}};
}

// Runs `kernel` over parts of the result: Winograd's where it is wanted and its results are finite, else the direct one.
// `sums` get a set of `accumulators` for each row part.
class Product {
 public:
  Product(ConvArgs& c, const Kernels& isa, int64_t direct_unit) : c_(c), isa_(isa), direct_unit_(direct_unit) {}

  void run(bool wanted, Sums& sums, int64_t accumulators) {
    const bool transformed = wanted && takes_winograd(c_, isa_) && shares(true).count() >= shares(false).count();
    if (transformed && part(true, sums, accumulators)) return;
    part(false, sums, accumulators);
  }

 private:
  // Winograd's rows are whole images, which are also the tiles of its statistics.
  Shares shares(bool transformed) const {
    const int64_t image = c_.out[0] * c_.out[1], depth = c_.filter[0] * c_.filter[1] * c_.channels;
    return product_shares(flat(depth, c_.outputs, c_.batch * image), c_.outputs, transformed ? image : direct_unit_);
  }

  bool part(bool transformed, Sums& sums, int64_t accumulators) {
    const int64_t image = c_.out[0] * c_.out[1];
    pack_filters(c_, isa_, transformed);
    if (!c_.is_mirrored) c_.store.tile_rows = transformed ? image : kStatisticsRows;
    const Shares shares = this->shares(transformed);
    const ConvKernel kernel = transformed ? (c_.is_mirrored ? isa_.winograd_dgrad : isa_.winograd_fwd)
                                          : (c_.is_mirrored ? isa_.conv_dgrad : isa_.conv_fwd);
    sums.assign(shares.count(), std::vector<double>(accumulators));
    std::vector<char> unfinished(shares.count());
    shares.for_each([&](ProjectionTask& task, int64_t row_part) {
      const int64_t own = row_part * shares.channels.parts + shares.channels.part_of(task.channels[0]);
      bool is_unfinished = false;
      task.sums = sums[own].data();
      task.unfinished = &is_unfinished;
      if (transformed) {
        BandMemory::of_thread().reserve_patches(c_, isa_, task);
      } else if (c_.band > 0) {
        BandMemory::of_thread().reserve(c_, task);
      }
      kernel(c_, task);
      unfinished[own] = static_cast<char>(is_unfinished);
    });
    return std::none_of(unfinished.begin(), unfinished.end(), [](char c) { return c != 0; });
  }

  ConvArgs& c_;
  const Kernels& isa_;
  int64_t direct_unit_;
};

} // namespace resnet_fused::cpu
