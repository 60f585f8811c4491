// How a packed convolution runs: its memory, its filters in panels, and its parts on the threads.
#pragma once

#include <cstdlib>

#include "projection.h"

namespace resnet_fused::cpu {

// The kernels of one instruction set for convolutions of one dtype.
struct Products {
  const Kernels& isa;
  const ConvKernels& kernels;

  Products(const Kernels& table, DType dtype) : isa(table), kernels(table.convolution[dtype]) {}
};

// Bytes of the images that a band holds: what they are read by is in the caches with them.
inline int64_t band_bytes(const Products& own) { return (own.isa.vector_bytes == 64 ? 768 : 192) * 1024; }

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

// The filters in panels, by all threads; Winograd's are 16 of them.
inline void pack_filters(ConvArgs& c, const ConvKernels& own, bool transformed) {
  thread_local Buffer memory;
  constexpr int64_t kTransformed = 16;
  const int64_t panels = (c.outputs + own.panel_columns - 1) / own.panel_columns;
  const int64_t taps = transformed ? kTransformed : c.filter[0] * c.filter[1];
  const int64_t steps = (taps * c.channels + own.depth_step - 1) / own.depth_step * own.depth_step;
  const int64_t elements = steps * panels * own.panel_columns;
  c.packed = memory.of(elements * own.element);
  const ConvArgs& args = c;
  for_parts(parts_of(panels, elements), panels, [&](int64_t, int64_t begin, int64_t end) {
    transformed ? own.winograd_pack(args, begin, end, workspace()) : own.pack(args, begin, end);
  });
}

// 4x4 patches of all images, each of 2x2 results.
inline int64_t patches_of(const ConvArgs& c) { return c.batch * ((c.out[0] + 1) / 2) * ((c.out[1] + 1) / 2); }

// Whether Winograd's threads share columns and not images: where the filters are more than the patches.
inline bool shares_patches(const ConvArgs& c) { return c.outputs > patches_of(c); }

// Whether Winograd saves `least` multiplications of each pair of channels, to pay for its transforms.
constexpr int64_t kFilterSaving = 2400, kSharedFilterSaving = 800; // of filters that go through memory, or do not
inline bool takes_winograd(const ConvArgs& c, const ConvKernels& own, int64_t least) {
  constexpr int64_t kFewest = 16; // channels
  const bool fits = c.filter[0] == 3 && c.filter[1] == 3 && c.stride[0] == 1 && c.stride[1] == 1 &&
      c.grid_step[0] == 1 && c.grid_step[1] == 1 && c.channels <= own.deepest;
  const int64_t saved = 9 * c.batch * c.out[0] * c.out[1] - 16 * patches_of(c);
  return fits && c.channels >= kFewest && c.outputs >= kFewest && saved >= least;
}

// The memory of a thread's bands.
class BandMemory {
 public:
  // For bands of `most` points of the grid.
  void reserve(const ConvArgs& c, const ConvKernels& own, ProjectionTask& task, int64_t most) {
    const int64_t per_image = std::max<int64_t>(0, c.filter[0] - c.stride[0]);
    const int64_t points = most + 128; // as Blocks rounds them
    const int64_t rows = (points / c.out[1] + 2) * c.stride[0] + (points / (c.out[0] * c.out[1]) + 2) * per_image +
        c.filter[0];
    const int64_t pitch = ((c.out[1] - 1) * c.stride[1] + c.filter[1]) * c.channels;
    constexpr int64_t kSpare = 2048; // elements, that whole vectors and runs are read and written past the end
    task.band = images_.of((rows * pitch + kSpare) * own.element);
    task.offsets = static_cast<int32_t*>(offsets_.of(points * 4));
  }

  // For bands of whole groups of patches, and `elements` for what they are transformed to.
  void reserve_patches(const ConvArgs& c, const ConvKernels& own, ProjectionTask& task, int64_t elements) {
    reserve(c, own, task, std::max(c.band, 4 * std::max(kMostPatches, c.out[1])));
    task.patches = patches_.of(elements * own.element);
  }

  // For the bands of narrow_weight, and what it sums.
  void reserve_narrow(const ConvArgs& c, const ConvKernels& own, ProjectionTask& task) {
    reserve(c, own, task, c.band);
    task.patches = patches_.of(own.narrow_weight_elements(c) * own.element);
  }

  static BandMemory& of_thread() {
    thread_local BandMemory memory;
    return memory;
  }

 private:
  Buffer images_, offsets_, patches_;
};

// How many points have their images within `bytes`: whole rows of the grid, one at least.
inline int64_t points_within(const ConvArgs& c, const ConvKernels& own, int64_t bytes) {
  const int64_t row_bytes = ((c.out[1] - 1) * c.stride[1] + c.filter[1]) * c.channels * own.element;
  return std::max<int64_t>(1, (bytes / row_bytes - c.filter[0]) / c.stride[0]) * c.out[1];
}

// How many points a band has, or 0 where the images are read in place.
inline int64_t band_of(const ConvArgs& c, const Products& own) {
  const bool in_place = c.filter[0] == 1 && c.filter[1] == 1 && c.stride[0] == 1 && c.stride[1] == 1 &&
      c.before[0] == 0 && c.before[1] == 0 && c.in[0] == c.out[0] && c.in[1] == c.out[1];
  return in_place ? 0 : points_within(c, own.kernels, band_bytes(own));
}

// One set of accumulators for each part.
using Sums = std::vector<std::vector<double>>;

// A product of (rows, depth) by (depth, outputs), for those who share it out.
inline ProjectionSizes flat(int64_t depth, int64_t outputs, int64_t rows) {
  return {1, depth, rows, 1, outputs, rows, 1, {1, 1}};
}

// Whether a picture's filter is one that narrow.h has.
inline bool is_narrow_stem(const ConvArgs& c) {
  const auto sides = [&](int64_t filter, int64_t stride) {
    return c.filter[0] == filter && c.filter[1] == filter && c.stride[0] == stride && c.stride[1] == stride;
  };
  return c.channels == kPictureChannels && !c.is_mirrored && (sides(3, 1) || sides(3, 2) || sides(7, 2));
}

// Whether a filter of up to 3x3 is so narrow that a panel of it would be one vector or two, or for a stride of 2, where
// Winograd is of no help, four.
inline bool is_narrow(const ConvArgs& c) {
  if (is_narrow_stem(c)) return c.outputs <= 64;
  const auto both = [](const int64_t* sides, int64_t value) { return sides[0] == value && sides[1] == value; };
  const bool few = c.channels == 16 || c.channels == 32, is_3x3 = both(c.filter, 3);
  if (both(c.stride, 1) && both(c.grid_step, 1)) return is_3x3 && few && c.outputs <= 32;
  if (both(c.stride, 2) && both(c.grid_step, 1)) return is_3x3 && few && c.outputs <= 64;
  const bool is_half = c.filter[0] > 0 && c.filter[0] <= 2 && c.filter[1] > 0 && c.filter[1] <= 2; // of its dgrad
  return both(c.stride, 1) && both(c.grid_step, 2) && is_half && (few || c.channels == 64) && c.outputs <= 32;
}

// How many points a band of it has: it is read again from the first-level caches, or the second.
inline int64_t narrow_band_of(const ConvArgs& c, const ConvKernels& own) { return points_within(c, own, 64 * 1024); }

// Runs a product over parts of the result: the narrow kernels' or Winograd's where they are faster and shared as well as
// the direct one, and Winograd's results are finite; else the direct one. `sums` get a set of `accumulators` for each part.
class Product {
 public:
  Product(ConvArgs& c, const ConvKernels& own, int64_t direct_unit) : c_(c), own_(own), direct_unit_(direct_unit) {}

  void run(bool winograd, Sums& sums, int64_t accumulators) {
    const int64_t direct = shares(kDirect).count();
    if (own_.narrow_fwd != nullptr && is_narrow(c_) && shares(kNarrow).count() >= direct) {
      part(kNarrow, sums, accumulators);
      return;
    }
    const int64_t least = shares_patches(c_) ? kSharedFilterSaving : kFilterSaving;
    const bool transformed = winograd && takes_winograd(c_, own_, least) && shares(kWinograd).count() >= direct;
    if (transformed && part(kWinograd, sums, accumulators)) return;
    part(kDirect, sums, accumulators);
  }

 private:
  enum Way { kDirect, kNarrow, kWinograd };

  // The rows of the others are whole images, which are also the tiles of their statistics.
  Shares shares(Way way) const {
    const int64_t image = c_.out[0] * c_.out[1], depth = c_.filter[0] * c_.filter[1] * c_.channels;
    const int64_t unit = way == kDirect ? direct_unit_
        : way == kWinograd && shares_patches(c_) ? c_.batch * image : image;
    return product_shares(flat(depth, c_.outputs, c_.batch * image), c_.outputs, unit);
  }

  void transform_patches() {
    thread_local Buffer memory;
    c_.patches = memory.of(16 * patches_of(c_) * own_.patch_pitch(c_) * own_.element);
    const int64_t rows = c_.batch * ((c_.out[0] + 1) / 2);
    for_parts(parts_of(rows, 16 * patches_of(c_) * c_.channels), rows, [&](int64_t, int64_t begin, int64_t end) {
      ProjectionTask task;
      task.rows[0] = begin;
      task.rows[1] = end;
      BandMemory::of_thread().reserve(c_, own_, task, std::max(c_.band, 4 * c_.out[1]));
      own_.winograd_patches(c_, task);
    });
  }

  void prepare(Way way) {
    c_.patches = nullptr;
    if (way == kNarrow) {
      c_.band = narrow_band_of(c_, own_);
      return;
    }
    way == kWinograd && shares_patches(c_) ? transform_patches() : pack_filters(c_, own_, way == kWinograd);
  }

  bool part(Way way, Sums& sums, int64_t accumulators) {
    prepare(way);
    if (!c_.is_mirrored) c_.store.tile_rows = way == kDirect ? kStatisticsRows : c_.out[0] * c_.out[1];
    const int64_t work = c_.batch * c_.out[0] * c_.out[1] * c_.filter[0] * c_.filter[1] * c_.channels * c_.outputs;
    const Shares shares = this->shares(way).finer(work);
    const ConvKernel kernels[][2] = {{own_.fwd, own_.dgrad},
                                     {own_.narrow_fwd, own_.narrow_dgrad},
                                     {own_.winograd_fwd, own_.winograd_dgrad}};
    const ConvKernel kernel = kernels[way][c_.is_mirrored];
    sums.assign(shares.count(), std::vector<double>(accumulators));
    std::vector<char> unfinished(shares.count());
    shares.for_each([&](ProjectionTask& task, int64_t row_part) {
      const int64_t own = row_part * shares.channels.parts + shares.channels.part_of(task.channels[0]);
      bool is_unfinished = false;
      task.sums = sums[own].data();
      task.unfinished = &is_unfinished;
      if (way == kWinograd) {
        BandMemory::of_thread().reserve_patches(c_, own_, task, own_.winograd_elements(c_));
      } else if (c_.band > 0) {
        BandMemory::of_thread().reserve(c_, own_, task, std::min(c_.band, task.rows[1] - task.rows[0]));
      }
      kernel(c_, task);
      unfinished[own] = static_cast<char>(is_unfinished);
    });
    return std::none_of(unfinished.begin(), unfinished.end(), [](char c) { return c != 0; });
  }

  ConvArgs& c_;
  const ConvKernels& own_;
  int64_t direct_unit_;
};

} // namespace resnet_fused::cpu
