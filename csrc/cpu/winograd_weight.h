// The weight's gradient of 3x3 convolutions of stride 1 by Winograd's F(3x3, 2x2): the transpose of what winograd.h
// multiplies. Included by convolutions.cpp only.
//
//   dU = the sum over the patches of (B' d B) (A dy A'), dg = G' dU G
//
// 16 matrix products whose depth is the patches. Where dU is small each task has rows of patches, and a dU of its own
// in the second-level cache. Else each has rows of dU: V and A dy A' are made once for all tasks, a chunk of the
// patches that the caches hold at a time.

constexpr int64_t kWeightPatchBytes = (kVectorBytes == 64 ? 768 : 192) * 1024; // of a group: V and A dy A'
constexpr int64_t kWeightRows = 64, kWeightColumns = 256; // of a block of dU
static_assert(kWeightRows % kDepthPitch<float> == 0, "blocks begin at whole panels");

// A matrix of patches by channels, 16 times, in panels of W channels.
template <class T, int64_t W>
struct PatchPanels {
  T* data;
  int64_t patches, next; // of a panel, and elements between the 16

  PatchPanels(void* memory, int64_t count, int64_t channels)
      : data(static_cast<T*>(memory)), patches(count), next(count * ((channels + W - 1) / W * W)) {}
  int64_t elements() const { return kPoints * next; }
  T* at(int64_t patch, int64_t channel) const { return data + (channel / W * patches + patch) * W + channel % W; }
};
template <class T>
using LeftPatches = PatchPanels<T, kDepthPitch<T>>; // of A dy A'
template <class T>
using RightPatches = PatchPanels<T, kPanelColumns<T>>; // of V

// A dy A' of rows of patches; dy is zero outside the grid. Asks for the next row meanwhile.
template <class T, class Source>
void transform_gradients(const PatchGrid& grid, const Source& dy, int64_t outputs, Range rows,
                         const LeftPatches<T>& out, int64_t first) {
  for (int64_t row = rows.begin; row < rows.end; ++row, first += grid.across) {
    const int64_t point = grid.point(row), made = grid.made(row), next = grid.point(row + 1) - point;
    for (int64_t j = 0; j < outputs; j += kLanes<T>) {
      const auto column = dy.column(j);
      for (int64_t i = 0; i < grid.across; ++i) {
        Vec<T> y[2][2] = {};
        for (int64_t b = 0; b < 2 && 2 * i + b < grid.width; ++b) {
          const int64_t at = point + 2 * i + b;
          y[0][b] = load_within(dy, column, dy.offset(at) + j);
          if (made > 1) y[1][b] = load_within(dy, column, dy.offset(at + grid.width) + j);
          dy.prefetch(dy.offset(at + next) + j);
          if (made > 1) dy.prefetch(dy.offset(at + next + grid.width) + j);
        }
        T* to = out.at(first + i, j);
        const Vec<T> lines[kSide][2] = {{y[0][0], y[0][1]},
                                        {y[0][0] + y[1][0], y[0][1] + y[1][1]},
                                        {y[0][0] - y[1][0], y[0][1] - y[1][1]},
                                        {-y[1][0], -y[1][1]}};
#pragma GCC unroll 4
        for (int r = 0; r < kSide; ++r, to += kSide * out.next) {
          store_vec(to, lines[r][0]);
          store_vec(to + out.next, lines[r][0] + lines[r][1]);
          store_vec(to + 2 * out.next, lines[r][0] - lines[r][1]);
          store_vec(to + 3 * out.next, -lines[r][1]);
        }
      }
    }
  }
}

// A block of dU: the 16 one after another, rows of whole panels of columns.
template <class T>
struct WeightBlock {
  Range rows, columns;
  T* data;

  int64_t pitch() const { return whole_panels<T>(columns.end - columns.begin); }
  int64_t next() const { return (rows.end - rows.begin) * pitch(); }

  // Of `steps` patches. Rows begin at whole panels, and so do columns.
  void multiply(const LeftPatches<T>& left, const RightPatches<T>& right, int64_t steps, bool add) const {
    for (int64_t point = 0; point < kPoints; ++point) {
      for (int64_t j = columns.begin; j < columns.end; j += kPanelColumns<T>) {
        const T* panel = right.at(0, j) + point * right.next;
        T* out = data + point * next() + j - columns.begin;
        const int64_t chains = steps > kChain ? (steps + kChain - 1) / kChain : 1;
        for (int64_t chain = 0; chain < chains; ++chain) {
          const int64_t d = steps * chain / chains, depth = steps * (chain + 1) / chains - d;
          for (int64_t k = rows.begin; k < rows.end; k += kDepthPitch<T>) {
            const T* block = left.at(d, k) + point * left.next;
            tiles(block, panel + d * kPanelColumns<T>, k, columns.end - j, depth, out, add || chain > 0);
          }
        }
      }
    }
  }

  // dg = G' dU G into (K, 9, C); added to unfinished: zero times all of it.
  void finish(T* result, int64_t channels, Vec<T>& unfinished) const {
    const T half = static_cast<T>(0.5);
    const auto line = [&](Vec<T> a, Vec<T> b, Vec<T> c, Vec<T> d, Vec<T>* out) {
      const Vec<T> sum = (b + c) * half;
      out[0] = a + sum;
      out[1] = (b - c) * half;
      out[2] = sum + d;
    };
    for (int64_t k = rows.begin; k < rows.end; ++k) {
      for (int64_t j = columns.begin; j < columns.end; j += kLanes<T>) {
        const T* at = data + (k - rows.begin) * pitch() + j - columns.begin;
        Vec<T> across[kSide][3], taps[3];
#pragma GCC unroll 4
        for (int r = 0; r < kSide; ++r, at += kSide * next()) {
          line(load_vec(at), load_vec(at + next()), load_vec(at + 2 * next()), load_vec(at + 3 * next()), across[r]);
        }
        T* to = result + k * 9 * channels + j;
        const SomeLanes lanes{columns.end - j < kLanes<T> ? columns.end - j : kLanes<T>};
#pragma GCC unroll 3
        for (int s = 0; s < 3; ++s, to += channels) {
          line(across[0][s], across[1][s], across[2][s], across[3][s], taps);
#pragma GCC unroll 3
          for (int r = 0; r < 3; ++r) {
            lanes.store(to + r * 3 * channels, taps[r]);
            unfinished = fma(taps[r], Vec<T>{}, unfinished);
          }
        }
      }
    }
  }

 private:
  void tiles(const T* left, const T* right, int64_t k, int64_t wide, int64_t depth, T* out, bool add) const {
    const int64_t count = rows.end - k < kDepthPitch<T> ? rows.end - k : kDepthPitch<T>;
    const Panels cut(0, count, wide > 2 * kLanes<T> ? kWideRows : kPanelRows);
    for (int64_t p = 0; p < cut.count; ++p) {
      T* to = out + (k - rows.begin + cut.start(p)) * pitch();
      multiply_tile<T, kByDepth>(cut.rows(p), wide, depth, left + cut.start(p), right, to, pitch(), add,
                                 {reinterpret_cast<const char*>(left), 0});
    }
  }
};

// How many rows of patches are transformed together where dU is the task's own.
template <class T>
int64_t weight_group(const ConvArgs& c, const PatchGrid& grid) {
  constexpr int64_t element = sizeof(T);
  const int64_t fit = kWeightPatchBytes / (kPoints * (c.channels + c.outputs) * element);
  const int64_t patches = fit < kMostPatches ? fit : kMostPatches;
  return patches > grid.across ? patches / grid.across : 1;
}

// Elements of a task's memory.
template <class A>
int64_t winograd_weight_elements(const ConvArgs& c) {
  using T = Opmath<A>;
  if (c.patches != nullptr) return kPoints * kWeightRows * kWeightColumns;
  const PatchGrid grid(c);
  const int64_t patches = weight_group<T>(c, grid) * grid.across;
  const LeftPatches<T> left(nullptr, patches, c.outputs);
  const RightPatches<T> right(nullptr, patches, c.channels);
  return left.elements() + right.elements() + kPoints * c.outputs * whole_panels<T>(c.channels);
}

// Calls run(band, rows, dy) for bands of rows of patches.
template <class A, class Body>
void for_weight_bands(const ConvArgs& c, const ProjectionTask& task, const PatchGrid& grid, int64_t unit,
                      const Body& run) {
  using T = Opmath<A>;
  with_source<A>(c.gradient, c.gradient_kind, c.batch * c.out[0] * c.out[1], c.outputs, [&](const auto& dy) {
    with_source<A>(c.image, c.kind, c.batch * c.in[0] * c.in[1], c.channels, [&](const auto& source) {
      for_patch_bands<T>(c, task, grid, {task.rows[0], task.rows[1]}, unit, source,
                         [&](const Band<T>& band, Range rows) { run(band, rows, dy); });
    });
  });
}

// V and A dy A' of rows of the chunk's patches, for all tasks.
template <class A>
void winograd_weight_patches(const ConvArgs& c, const ProjectionTask& task) {
  using T = Opmath<A>;
  const PatchGrid grid(c);
  const int64_t count = (c.chunk[1] - c.chunk[0]) * grid.across;
  const LeftPatches<T> left(c.gradients, count, c.outputs);
  const RightPatches<T> right(c.patches, count, c.channels);
  for_weight_bands<A>(c, task, grid, 1, [&](const Band<T>& band, Range rows, const auto& dy) {
    const int64_t first = (rows.begin - c.chunk[0]) * grid.across;
    transform_patches(c, grid, band, rows, right.next,
                      [&](int64_t patch, int64_t channel) { return right.at(first + patch, channel); });
    transform_gradients(grid, dy, c.outputs, rows, left, first);
  });
}

// The chunk's part of the task's rows of dU, and their gradients after the last chunk.
template <class A>
void winograd_weight_rows(const ConvArgs& c, const ProjectionTask& task, Vec<Opmath<A>>& unfinished) {
  using T = Opmath<A>;
  const PatchGrid grid(c);
  const int64_t count = (c.chunk[1] - c.chunk[0]) * grid.across;
  const LeftPatches<T> left(c.gradients, count, c.outputs);
  const RightPatches<T> right(c.patches, count, c.channels);
  for (int64_t k = task.channels[0]; k < task.channels[1]; k += kWeightRows) {
    const Range rows{k, k + kWeightRows < task.channels[1] ? k + kWeightRows : task.channels[1]};
    for (int64_t j = 0; j < c.channels; j += kWeightColumns) {
      const Range columns{j, j + kWeightColumns < c.channels ? j + kWeightColumns : c.channels};
      T* kept = static_cast<T*>(c.products) + kPoints * (k * whole_panels<T>(c.channels) + (rows.end - k) * j);
      const WeightBlock<T> block{rows, columns, c.products == nullptr ? static_cast<T*>(task.patches) : kept};
      block.multiply(left, right, count, c.chunk[0] > 0);
      if (c.chunk[1] == grid.rows) block.finish(static_cast<T*>(task.result), c.channels, unfinished);
    }
  }
}

template <class A>
void winograd_wgrad(const ConvArgs& c, const ProjectionTask& task) {
  using T = Opmath<A>;
  Vec<T> unfinished{};
  if (c.patches != nullptr) {
    winograd_weight_rows<A>(c, task, unfinished);
  } else {
    const PatchGrid grid(c);
    const int64_t group = weight_group<T>(c, grid), patches = group * grid.across;
    const LeftPatches<T> left(task.patches, patches, c.outputs);
    const RightPatches<T> right(left.data + left.elements(), patches, c.channels);
    const WeightBlock<T> block{{0, c.outputs}, {0, c.channels}, right.data + right.elements()};
    bool add = false;
    for_weight_bands<A>(c, task, grid, group, [&](const Band<T>& band, Range rows, const auto& dy) {
      for (int64_t row = rows.begin; row < rows.end; row += group, add = true) {
        const Range some{row, row + group < rows.end ? row + group : rows.end};
        transform_patches(c, grid, band, some, right.next,
                          [&](int64_t patch, int64_t channel) { return right.at(patch, channel); });
        transform_gradients(grid, dy, c.outputs, some, left, 0);
        block.multiply(left, right, (some.end - some.begin) * grid.across, add);
      }
    });
    block.finish(static_cast<T*>(task.result), c.channels, unfinished);
  }
  if (!is_zero(unfinished)) *task.unfinished = true;
}
