// 3x3 convolutions of stride 1 by Winograd's F(2x2, 3x3): a patch of 4x4 pixels makes 2x2 results by 16 products, not
// 36 (Lavin and Gray, "Fast algorithms for convolutional neural networks", 2015). Included by convolutions.cpp only.
//
//   V = B' d B of each patch, U = G g G' of each filter, M = the sum of U V over the channels, result = A' M A
//
// The 16 elements of V, each of all patches of a group, are the left panels of 16 matrix products whose depth is the
// channels; a group's V stays in the second-level cache while the filters stream past it, a block of columns at a time.
// Where the filters are more than the patches, each thread has columns of its own instead: all patches are transformed
// once for all threads, and U is made by the one thread that multiplies it, a block at a time.
//
// What it does to the error: sums of four pixels are rounded once more; measured, it stays within the numerics law
// where F(4x4, 3x3), whose transforms multiply by up to 8, would not. A result that is not finite may come of a
// neighbour in its patch, or of an infinity less another: such a task is reported, and computed again directly.

// Elements of a thread's memory: V of a group or U of a block, M and the results.
template <class A>
int64_t winograd_elements(const ConvArgs& c) {
  using T = Opmath<A>;
  const PatchGrid grid(c);
  const int64_t patches = PatchGroup<T>(c, grid, grid.rows).most * grid.across;
  const int64_t own = c.patches == nullptr ? patches * patch_pitch<T>(c) : c.channels * kBlockColumns;
  return kPoints * (own + patches * kBlockColumns) + 4 * patches * kBlockColumns;
}

// Products of V and U, a group and a block of columns at a time, and what becomes of them.
template <class T, class Store>
class PatchProduct {
 public:
  // `memory`: of M and the results of `patches`.
  PatchProduct(const ConvArgs& c, const PatchGrid& grid, Store& store, T* memory, int64_t patches)
      : c_(c),
        grid_(grid),
        store_(store),
        product_(memory),
        results_(memory + kPoints * patches * kBlockColumns),
        pitch_(c.outputs < kBlockColumns ? (c.outputs + kLanes<T> - 1) / kLanes<T> * kLanes<T> : kBlockColumns) {}

  bool is_finite() const { return is_zero(unfinished_); }

  // Rows of patches, whose V is at `left`, its points `left_pitch` apart, times the columns [column, column + columns),
  // whose U is at `right`, `right_pitch` apart. `next`: what U is needed after it.
  void run(Range rows, const T* left, int64_t left_pitch, int64_t column, int64_t columns, const T* right,
           int64_t right_pitch, const T* next) {
    patches_ = (rows.end - rows.begin) * grid_.across;
    const Panels cut(0, patches_, kPanelRows);
    const int64_t first = grid_.point(rows.begin), points = grid_.point(rows.end) - first;
    for (int point = 0; point < kPoints; ++point) {
      LookAhead look(left);
      const T* after = point + 1 < kPoints ? right + (point + 1) * right_pitch : next;
      look.add(after, c_.channels * whole_panels<T>(columns) * sizeof(T));
      const int64_t from = points * point / kPoints, to = points * (point + 1) / kPoints;
      store_.ahead(look, first + from, static_cast<int>(to - from), column, columns);
      look.share(whole_panels<T>(columns) / kPanelColumns<T> * cut.count *
                 calls_of_tile<T>(kPanelRows, columns, c_.channels));
      T* out = product_ + point * patches_ * pitch_;
      c_.channels <= kMostShort<T>
          ? multiply<kByShortRows>(cut, left + point * left_pitch, right + point * right_pitch, columns, out, look)
          : multiply<kByRows>(cut, left + point * left_pitch, right + point * right_pitch, columns, out, look);
    }
    const int64_t row_pitch = 2 * grid_.across * pitch_;
    T* results = results_;
    const T* product = product_;
    for (int64_t row = rows.begin; row < rows.end; ++row, results += 2 * row_pitch) {
      for (int64_t i = 0; i < grid_.across; ++i, product += pitch_) {
        inverse(product, results + 2 * i * pitch_, row_pitch, grid_.made(row) == 2,
                2 * i + 1 < grid_.width, columns);
      }
      for (int64_t i = 0; i < grid_.made(row); ++i) {
        finish(results + i * row_pitch, grid_.point(row) + i * grid_.width, column, columns);
      }
    }
  }

 private:
  // A part of the depth after another: U's part is in the first-level cache for all panels.
  template <LeftLayout layout>
  void multiply(const Panels& cut, const T* left, const T* right, int64_t columns, T* out, LookAhead& look) const {
    const int64_t C = c_.channels, chains = C > kChain ? (C + kChain - 1) / kChain : 1;
    for (int64_t j = 0; j < columns; j += kPanelColumns<T>, right += C * kPanelColumns<T>) {
      for (int64_t chain = 0; chain < chains; ++chain) {
        const int64_t d = C * chain / chains, steps = C * (chain + 1) / chains - d;
        for (int64_t p = 0; p < cut.count; ++p) {
          const Ahead ahead = look.take(calls_of_tile<T>(cut.rows(p), columns - j, steps));
          multiply_tile<T, layout>(cut.rows(p), columns - j, steps, left + cut.start(p) * kAcross<T, layout> + d,
                                   right + d * kPanelColumns<T>, out + cut.start(p) * pitch_ + j, pitch_, chain > 0,
                                   ahead);
        }
      }
    }
  }

  void inverse(const T* product, T* out, int64_t row, bool below, bool beside, int64_t columns) {
    const int64_t next = patches_ * pitch_;
    for (int64_t k = 0; k < columns; k += kLanes<T>) {
      Vec<T> upper[kSide], lower[kSide];
#pragma GCC unroll 4
      for (int s = 0; s < kSide; ++s) {
        const T* at = product + s * next + k;
        const Vec<T> b = load_vec(at + kSide * next), c = load_vec(at + 2 * kSide * next);
        upper[s] = load_vec(at) + b + c;
        lower[s] = b - c - load_vec(at + 3 * kSide * next);
      }
      put(out + k, upper[0] + upper[1] + upper[2], true);
      put(out + pitch_ + k, upper[1] - upper[2] - upper[3], beside);
      put(out + row + k, lower[0] + lower[1] + lower[2], below);
      put(out + row + pitch_ + k, lower[1] - lower[2] - lower[3], below && beside);
    }
  }

  void put(T* at, Vec<T> v, bool exists) {
    store_vec(at, v);
    if (exists) unfinished_ = fma(v, Vec<T>{}, unfinished_); // a NaN once there was one, or an infinity
  }

  void finish(T* results, int64_t point, int64_t column, int64_t columns) const {
    for (int64_t q = 0; q < grid_.width; q += kPanelRows) {
      const int64_t rows = grid_.width - q < kPanelRows ? grid_.width - q : kPanelRows;
      store_.finish(results + q * pitch_, pitch_, point + q, static_cast<int>(rows), column, columns);
    }
  }

  const ConvArgs& c_;
  const PatchGrid& grid_;
  Store& store_;
  T* const product_;
  T* const results_;
  const int64_t pitch_; // of rows of the products and the results
  int64_t patches_ = 0;
  Vec<T> unfinished_{};
};

// The places of left panels by rows.
template <class T>
ALWAYS_INLINE auto by_rows(T* left, int64_t pitch) {
  return [=](int64_t patch, int64_t channel) { return left + patch * pitch + channel; };
}

// V of the rows of patches that the task has, for winograd_columns.
template <class A>
void winograd_patches(const ConvArgs& c, const ProjectionTask& task) {
  using T = Opmath<A>;
  const PatchGrid grid(c);
  const int64_t pitch = patch_pitch<T>(c);
  with_source<A>(c.image, c.kind, c.batch * c.in[0] * c.in[1], c.channels, [&](const auto& source) {
    for_patch_bands<T>(c, task, grid, {task.rows[0], task.rows[1]}, 1, source, [&](const Band<T>& band, Range rows) {
      T* out = static_cast<T*>(c.patches) + rows.begin * grid.across * pitch;
      transform_patches(c, grid, band, rows, grid.rows * grid.across * pitch, by_rows(out, pitch));
    });
  });
}

// All patches times the task's columns.
template <class A, class Store>
void winograd_columns(const ConvArgs& c, const ProjectionTask& task, Store& store) {
  using T = Opmath<A>;
  const PatchGrid grid(c);
  const PatchGroup<T> group(c, grid, grid.rows);
  T* filters = static_cast<T*>(task.patches);
  const T* patches = static_cast<const T*>(c.patches);
  const int64_t pitch = c.channels * kBlockColumns, row = grid.across * patch_pitch<T>(c), left_pitch = grid.rows * row;
  PatchProduct<T, Store> product(c, grid, store, filters + kPoints * pitch, group.most * grid.across);
  for (int64_t j = task.channels[0]; j < task.channels[1]; j += kBlockColumns) {
    const int64_t stop = j + kBlockColumns < task.channels[1] ? j + kBlockColumns : task.channels[1];
    transform_filters<A>(c, {j, stop}, filters, pitch, task.workspace);
    for (int64_t i = 0; i < grid.rows; i += group.rows) {
      const int64_t end = i + group.rows < grid.rows ? i + group.rows : grid.rows;
      product.run({i, end}, patches + i * row, left_pitch, j, stop - j, filters, pitch, filters);
    }
  }
  fence_streams();
  if (!product.is_finite()) *task.unfinished = true;
}

// The task's rows are whole images.
template <class A, class Store>
void winograd(const ConvArgs& c, const ProjectionTask& task, Store& store) {
  if (c.patches != nullptr) return winograd_columns<A>(c, task, store);
  using T = Opmath<A>;
  const PatchGrid grid(c);
  const int64_t image = c.out[0] * c.out[1], C = c.channels;
  const Range own{task.rows[0] / image * grid.down, task.rows[1] / image * grid.down};
  const PatchGroup<T> group(c, grid, own.end - own.begin);
  T* left = static_cast<T*>(task.patches);
  const int64_t patches = group.most * grid.across, pitch = patch_pitch<T>(c), left_pitch = patches * pitch;
  const int64_t right_pitch = C * whole_panels<T>(c.outputs);
  const T* filters = static_cast<const T*>(c.packed);
  PatchProduct<T, Store> product(c, grid, store, left + kPoints * left_pitch, patches);
  with_source<A>(c.image, c.kind, c.batch * c.in[0] * c.in[1], C, [&](const auto& source) {
    for_patch_bands<T>(c, task, grid, own, group.rows, source, [&](const Band<T>& band, Range rows) {
      for (int64_t row = rows.begin; row < rows.end; row += group.rows) {
        const Range some{row, row + group.rows < rows.end ? row + group.rows : rows.end};
        transform_patches(c, grid, band, some, left_pitch, by_rows(left, pitch));
        for (int64_t j = task.channels[0]; j < task.channels[1]; j += kBlockColumns) {
          const int64_t columns = task.channels[1] - j, next = columns > kBlockColumns ? j + kBlockColumns
                                                                                       : task.channels[0];
          product.run(some, left, left_pitch, j, columns < kBlockColumns ? columns : kBlockColumns, filters + j * C,
                      right_pitch, filters + next * C);
        }
      }
    });
  });
  fence_streams();
  if (!product.is_finite()) *task.unfinished = true;
}

template <class A>
void winograd_fwd(const ConvArgs& c, const ProjectionTask& task) {
  with_forward_store<A>(c, task, [&](auto& store) { winograd<A>(c, task, store); });
}

template <class A>
void winograd_dgrad(const ConvArgs& c, const ProjectionTask& task) {
  GradientStore<A> store(c, task.sums);
  winograd<A>(c, task, store);
}
