// 3x3 convolutions of stride 1 by Winograd's F(2x2, 3x3): a patch of 4x4 pixels makes 2x2 results by 16 products, not
// 36 (Lavin and Gray, "Fast algorithms for convolutional neural networks", 2015). Included by kernels.cpp only.
//
//   V = B' d B of each patch, U = G g G' of each filter, M = the sum of U V over the channels, result = A' M A
//
// The 16 elements of V, each of all patches of a group, are the left panels of 16 matrix products whose depth is the
// channels. What it does to the error: sums of four pixels are rounded once more; measured, it stays within the numerics
// law where F(4x4, 3x3), whose transforms multiply by up to 8, would not. A result that is not finite may come of a
// neighbour in its patch, or of an infinity less another: such a task is reported, and computed again directly.

constexpr int kSide = 4;              // of a patch
constexpr int kPoints = kSide * kSide;
constexpr int64_t kPatchesAtOnce = 24; // at least, in whole rows of the grid of patches

// The patches that are transformed together: whole rows of an image's grid of patches.
template <class T>
struct PatchGroup {
  int64_t across, rows, panels, columns; // patches in a row, rows, panels of them, and of the results

  PatchGroup(const ConvArgs& c, int64_t outputs)
      : across((c.out[1] + 1) / 2),
        rows(kPatchesAtOnce > across ? kPatchesAtOnce / across : 1),
        panels((across * rows + kPanelRows - 1) / kPanelRows),
        columns((outputs + kPanelColumns<T> - 1) / kPanelColumns<T> * kPanelColumns<T>) {}

  int64_t left() const { return panels * kPanelRows * kRowPitch<T>; } // elements of one of the 16
  int64_t product() const { return panels * kPanelRows * columns; }
  int64_t results() const { return 2 * rows * 2 * across * columns; }
  int64_t elements() const { return kPoints * (left() + product()) + results(); }
};

template <class A>
int64_t winograd_elements(const ConvArgs& c, int64_t outputs) {
  return PatchGroup<Opmath<A>>(c, outputs).elements();
}

// Of four in a line: the rows of B'.
template <class V>
ALWAYS_INLINE void transform_line(V& a, V& b, V& c, V& d) {
  const V first = a - c, second = b + c, third = c - b, fourth = b - d;
  a = first;
  b = second;
  c = third;
  d = fourth;
}

// Filters [begin, end) of panels, transformed: the 16 one after another, each as PackedBefore of one block.
template <class A>
void winograd_pack(const ConvArgs& c, int64_t begin, int64_t end) {
  using T = Opmath<A>;
  constexpr int64_t L = kLanes<T>;
  const int64_t C = c.channels, columns = whole_panels<T>(c.outputs), taps = c.filter[0] * c.filter[1];
  const PlainRows<A> filters{static_cast<const A*>(c.weight), taps * C, c.outputs * taps * C};
  const MirroredFilters<A> mirrored(c);
  T* out = static_cast<T*>(c.packed);
  T* plain = out + kPoints * C * columns + begin * taps * C * kPanelColumns<T>; // room that the host left
  for (int64_t panel = begin; panel < end; ++panel, plain += taps * C * kPanelColumns<T>) {
    const int64_t j = panel * kPanelColumns<T>, whole = j + kPanelColumns<T>;
    const int64_t stop = whole < c.outputs ? whole : c.outputs;
    for (int64_t tap = 0; tap < taps; ++tap) {
      T* to = plain + tap * C * kPanelColumns<T>;
      if (c.is_mirrored) {
        pack_right_by_depth(mirrored, to, j, stop, tap * C, C);
      } else {
        pack_right_by_rows(filters, to, j, stop, tap * C, C);
      }
    }
    for (int64_t i = 0; i < C * kPanelColumns<T>; i += L) {
      Vec<T> g[3][3], rows[kSide][3];
      for (int t = 0; t < 9; ++t) g[t / 3][t % 3] = load_vec(plain + t * C * kPanelColumns<T> + i);
      const T half = static_cast<T>(0.5);
      for (int s = 0; s < 3; ++s) {
        const Vec<T> ends = g[0][s] + g[2][s];
        rows[0][s] = g[0][s];
        rows[1][s] = (ends + g[1][s]) * half;
        rows[2][s] = (ends - g[1][s]) * half;
        rows[3][s] = g[2][s];
      }
      for (int r = 0; r < kSide; ++r) {
        const Vec<T> ends = rows[r][0] + rows[r][2];
        const Vec<T> u[kSide] = {rows[r][0], (ends + rows[r][1]) * half, (ends - rows[r][1]) * half, rows[r][2]};
        for (int s = 0; s < kSide; ++s) store_vec(out + (r * kSide + s) * C * columns + j * C + i, u[s]);
      }
    }
  }
}

// Rows of one image's grid of patches: transforms, products, results.
template <class T, class Store>
class PatchRows {
 public:
  PatchRows(const ConvArgs& c, const ProjectionTask& task, Store& store)
      : c_(c),
        group_(c, task.channels[1] - task.channels[0]),
        first_(task.channels[0]),
        outputs_(task.channels[1] - task.channels[0]),
        left_(static_cast<T*>(task.patches)),
        product_(left_ + kPoints * group_.left()),
        results_(product_ + kPoints * group_.product()),
        store_(store) {}

  int64_t at_once() const { return group_.rows; }
  bool is_finite() const {
    for (int i = 0; i < kLanes<T>; ++i) {
      if (!(unfinished_[i] == 0)) return false;
    }
    return true;
  }

  // Patch rows [begin, end) of image n.
  void run(const Band<T>& band, int64_t n, int64_t begin, int64_t end) {
    const int64_t count = (end - begin) * group_.across;
    const Panels cut(0, count, kPanelRows);
    for (int64_t p = 0; p < cut.count; ++p) {
      for (int t = 0; t < cut.rows(p); ++t) {
        const int64_t patch = cut.start(p) + t, i = begin + patch / group_.across, j = patch % group_.across;
        const int64_t point = (n * c_.out[0] + 2 * i) * c_.out[1] + 2 * j;
        transform(band.data() + band.offset(point), band.pitch(), left_ + (p * kPanelRows + t) * kRowPitch<T>);
      }
    }
    multiply(cut);
    for (int64_t p = 0; p < cut.count; ++p) {
      for (int t = 0; t < cut.rows(p); ++t) {
        const int64_t patch = cut.start(p) + t;
        inverse(product_ + (p * kPanelRows + t) * group_.columns, patch / group_.across, patch % group_.across, begin);
      }
    }
    const int64_t last = 2 * end < c_.out[0] ? 2 * end : c_.out[0];
    for (int64_t row = 2 * begin; row < last; ++row) finish(row - 2 * begin, (n * c_.out[0] + row) * c_.out[1]);
  }

 private:
  void transform(const T* patch, int64_t pitch, T* out) const {
    const int64_t C = c_.channels;
    for (int64_t j = 0; j < C; j += kLanes<T>) {
      Vec<T> d[kSide][kSide];
#pragma GCC unroll 4
      for (int r = 0; r < kSide; ++r) {
#pragma GCC unroll 4
        for (int s = 0; s < kSide; ++s) d[r][s] = load_vec(patch + r * pitch + s * C + j);
      }
#pragma GCC unroll 4
      for (int s = 0; s < kSide; ++s) transform_line(d[0][s], d[1][s], d[2][s], d[3][s]);
#pragma GCC unroll 4
      for (int r = 0; r < kSide; ++r) {
        transform_line(d[r][0], d[r][1], d[r][2], d[r][3]);
#pragma GCC unroll 4
        for (int s = 0; s < kSide; ++s) store_vec(out + (r * kSide + s) * group_.left() + j, d[r][s]);
      }
    }
  }

  void multiply(const Panels& cut) const {
    const int64_t C = c_.channels, whole = whole_panels<T>(c_.outputs);
    const T* filters = static_cast<const T*>(c_.packed) + first_ * C;
    for (int point = 0; point < kPoints; ++point) {
      for (int64_t j = 0; j < outputs_; j += kPanelColumns<T>) {
        const int64_t own = outputs_ - j < kPanelColumns<T> ? outputs_ - j : kPanelColumns<T>;
        for (int64_t p = 0; p < cut.count; ++p) {
          const T* panel = left_ + point * group_.left() + p * kPanelRows * kRowPitch<T>;
          T* out = product_ + point * group_.product() + p * kPanelRows * group_.columns + j;
          multiply_tile<T, kByRows>(cut.rows(p), own, C, panel, filters + (point * whole + j) * C, out, group_.columns,
                                    false, {reinterpret_cast<const char*>(panel), 0});
        }
      }
    }
  }

  void inverse(const T* product, int64_t i, int64_t j, int64_t begin) {
    const int64_t row = 2 * group_.across * group_.columns;
    const bool below = 2 * (begin + i) + 1 < c_.out[0], beside = 2 * j + 1 < c_.out[1];
    T* out = results_ + 2 * i * row + 2 * j * group_.columns;
    for (int64_t k = 0; k < outputs_; k += kLanes<T>) {
      Vec<T> upper[kSide], lower[kSide];
#pragma GCC unroll 4
      for (int s = 0; s < kSide; ++s) {
        const T* at = product + s * group_.product() + k;
        const Vec<T> b = load_vec(at + kSide * group_.product()), c = load_vec(at + 2 * kSide * group_.product());
        upper[s] = load_vec(at) + b + c;
        lower[s] = b - c - load_vec(at + 3 * kSide * group_.product());
      }
      put(out + k, upper[0] + upper[1] + upper[2], true);
      put(out + group_.columns + k, upper[1] - upper[2] - upper[3], beside);
      put(out + row + k, lower[0] + lower[1] + lower[2], below);
      put(out + row + group_.columns + k, lower[1] - lower[2] - lower[3], below && beside);
    }
  }

  void put(T* at, Vec<T> v, bool exists) {
    store_vec(at, v);
    if (exists) unfinished_ = fma(v, Vec<T>{}, unfinished_); // a NaN once there was one, or an infinity
  }

  void finish(int64_t row, int64_t point) const {
    T* results = results_ + row * 2 * group_.across * group_.columns;
    for (int64_t q = 0; q < c_.out[1]; q += kPanelRows) {
      const int64_t rows = c_.out[1] - q < kPanelRows ? c_.out[1] - q : kPanelRows;
      store_.finish(results + q * group_.columns, group_.columns, point + q, static_cast<int>(rows), first_, outputs_);
    }
  }

  const ConvArgs& c_;
  const PatchGroup<T> group_;
  const int64_t first_, outputs_;
  T* const left_;
  T* const product_;
  T* const results_;
  Store& store_;
  Vec<T> unfinished_{};
};

// The task's rows are whole images.
template <class A, class Store>
void winograd(const ConvArgs& c, const ProjectionTask& task, Store& store) {
  using T = Opmath<A>;
  PatchRows<T, Store> patches(c, task, store);
  const int64_t image = c.out[0] * c.out[1], down = (c.out[0] + 1) / 2;
  const int64_t fit = c.band / (2 * c.out[1]) / patches.at_once() * patches.at_once();
  const int64_t step = fit > 0 ? fit : patches.at_once();
  with_source<A>(c.image, c.kind, c.batch * c.in[0] * c.in[1], c.channels, [&](const auto& source) {
    for (int64_t n = task.rows[0] / image; n < task.rows[1] / image; ++n) {
      for (int64_t i = 0; i < down; i += step) {
        const int64_t stop = i + step < down ? i + step : down, last = 2 * stop < c.out[0] ? 2 * stop : c.out[0];
        Band<T> band(c, task, {(n * c.out[0] + 2 * i) * c.out[1], (n * c.out[0] + last) * c.out[1]});
        band.fill(c, source);
        for (int64_t j = i; j < stop; j += patches.at_once()) {
          patches.run(band, n, j, j + patches.at_once() < stop ? j + patches.at_once() : stop);
        }
      }
    }
  });
  fence_streams();
  if (!patches.is_finite()) *task.unfinished = true;
}

template <class A>
void winograd_fwd(const ConvArgs& c, const ProjectionTask& task) {
  if (c.store.plain) {
    ForwardStore<A, true> store(c.store, task, task.sums);
    winograd<A>(c, task, store);
  } else {
    ForwardStore<A, false> store(c.store, task, task.sums);
    winograd<A>(c, task, store);
  }
}

template <class A>
void winograd_dgrad(const ConvArgs& c, const ProjectionTask& task) {
  GradientStore<A> store(c, task.sums);
  winograd<A>(c, task, store);
}
