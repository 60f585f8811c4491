// The projection's matrix products and what they write, templates over the stored type A: epilogues that normalise,
// scatter and reduce. Included by kernels.cpp only.

// Calls body(column, lanes) over `count` columns; `streamed` says that what is stored goes past the caches.
template <class A, class Body>
ALWAYS_INLINE void for_columns(int64_t count, bool streamed, const Body& body) {
  int64_t j = 0;
  if (streamed) {
    for (; j + kLanes<A> <= count; j += kLanes<A>) body(j, StreamedLanes{});
  } else {
    for (; j + kLanes<A> <= count; j += kLanes<A>) body(j, AllLanes{});
  }
  if (j < count) body(j, SomeLanes{count - j});
}

// Bias, affine, residual and ReLU, and the statistics of what is stored.
template <class A, bool plain>
struct ForwardStore {
  using T = Opmath<A>;
  using V = Vec<T>;
  static constexpr bool kTogether = false;
  const ProjectionArgs args; // by value: a reference would be read again after every store
  const int64_t aligned;
  double* acc;               // planes of mean - origin, M2, origin, for the columns of the task from `first` on
  int64_t first, plane, end_row;

  ForwardStore(const ProjectionArgs& a, const ProjectionTask& task, double* planes)
      : args(a),
        aligned(a.partials != nullptr ? a.tile_rows : kWholePanels),
        acc(planes),
        first(task.channels[0]),
        plane(a.plane),
        end_row(task.rows[1]) {}

  void finish(T* tile, int64_t pitch, int64_t row, int rows, int64_t column, int64_t columns) {
    for_columns<A>(columns, args.streamed, [&](int64_t j, auto lanes) {
      vector(tile + j, pitch, row, rows, column + j, lanes);
    });
    const int64_t done = row + rows;
    if (args.partials != nullptr && (done % args.tile_rows == 0 || done == end_row)) {
      const int64_t start = (done - 1) / args.tile_rows * args.tile_rows;
      for (int64_t j = column; j < column + columns; ++j) put_partials(start, done - start, j);
    }
  }

  void ahead(LookAhead& look, int64_t row, int rows, int64_t, int64_t columns) const {
    if (columns != args.outputs) return;
    const int64_t bytes = rows * columns * static_cast<int64_t>(sizeof(A));
    if (!args.streamed) look.add(static_cast<const A*>(args.result) + row * columns, bytes);
    if (args.add != nullptr) look.add(static_cast<const A*>(args.add) + row * columns, bytes);
  }

  template <class Lanes>
  ALWAYS_INLINE void vector(T* tile, int64_t pitch, int64_t row, int rows, int64_t j, Lanes lanes) {
    const auto* planes = static_cast<const T*>(args.constants);
    const V bias = plain ? V{} : load_vec(planes + kBias * plane + j);
    A* result = static_cast<A*>(args.result) + row * args.outputs + j;
    for (int r = 0; r < rows; ++r, result += args.outputs) {
      V z = load_vec(tile + r * pitch);
      if constexpr (!plain) z = finished(z + bias, planes, row + r, j, lanes);
      lanes.store(result, z);
      if constexpr (sizeof(A) == sizeof(T) && plain) continue;
      if (args.partials != nullptr) store_vec(tile + r * pitch, as_stored<A>(z));
    }
    if (args.partials != nullptr) reduce(tile, pitch, row, rows, j);
  }

  // A panel's rows into the sums of its tile, of differences from the mean of the tile's first panel.
  ALWAYS_INLINE void reduce(const T* tile, int64_t pitch, int64_t row, int rows, int64_t j) {
    double* at = acc + (j - first);
    T* origins = reinterpret_cast<T*>(acc + 2 * plane) + (j - first);
    if (row % args.tile_rows == 0) {
      const V start = load_vec(tile);
      V sum{};
      for (int r = 1; r < rows; ++r) sum += load_vec(tile + r * pitch) - start;
      store_vec(origins, start + sum * (static_cast<T>(1) / static_cast<T>(rows)));
      for (int64_t i = 0; i < kLanes<T>; i += kLanes<double>) {
        store_vec(at + i, Doubles{});
        store_vec(at + plane + i, Doubles{});
      }
    }
    const V origin = load_vec(origins);
    V sum{}, square{};
    for (int r = 0; r < rows; ++r) {
      const V difference = load_vec(tile + r * pitch) - origin;
      sum += difference;
      square = fma(difference, difference, square);
    }
    accumulate(at, sum, AllLanes{});
    accumulate(at + plane, square, AllLanes{});
  }

  template <class Lanes>
  ALWAYS_INLINE V finished(V z, const T* planes, int64_t row, int64_t j, Lanes lanes) const {
    if (args.has_affine) z = Affine<V>::at(planes, plane, kOwnMean, j).z(z);
    if (args.add != nullptr) {
      const V add = lanes.load(static_cast<const A*>(args.add) + row * args.outputs + j);
      z += args.has_add_affine ? Affine<V>::at(planes, plane, kAddMean, j).z(add) : add;
    }
    return args.relu ? zero_where_not_positive(z, z) : z;
  }

  void put_partials(int64_t start, int64_t rows, int64_t j) const {
    const double count = static_cast<double>(rows), sum = acc[j - first], shift = sum / count;
    double mean = shift + static_cast<double>(reinterpret_cast<const T*>(acc + 2 * plane)[j - first]);
    double m2 = acc[plane + j - first] - sum * shift;
    if (m2 < 0) m2 = 0; // rounded
    if (!(mean - mean == 0)) {
      const A* data = static_cast<const A*>(args.result) + start * args.outputs + j;
      args.plain_moments(kDTypeOf<A>, data, rows, args.outputs, &mean, &m2);
    }
    T* partials = static_cast<T*>(args.partials) + start / args.tile_rows * 3 * args.outputs + j;
    partials[0] = static_cast<T>(rows);
    partials[args.outputs] = static_cast<T>(mean);
    partials[2 * args.outputs] = static_cast<T>(m2);
  }
};

template <class A, bool plain>
void projection_fwd_as(const ProjectionArgs& args, const ProjectionTask& task) {
  using T = Opmath<A>;
  const GatheredRows<A> x(args);
  const PlainRows<A> weight{static_cast<const A*>(args.weight), args.channels, args.outputs * args.channels};
  const auto pack = [&](T* block, Range columns, Range steps) {
    pack_right_by_rows(weight, block, columns.begin, columns.end, steps.begin, steps.end - steps.begin);
  };
  ForwardStore<A, plain> store(args, task, task.sums);
  const PackedOnDemand<T, decltype(pack)> right{pack};
  MultiplyRows<T, GatheredRows<A>, decltype(right), ForwardStore<A, plain>> product(x, right, store, task.workspace);
  product.run({task.rows[0], task.rows[1]}, {task.channels[0], task.channels[1]}, args.channels);
  fence_streams();
}

template <class A>
void projection_fwd(const ProjectionArgs& args, const ProjectionTask& task) {
  args.plain ? projection_fwd_as<A, true>(args, task) : projection_fwd_as<A, false>(args, task);
}

// dx at all the positions that the rows own: the product where it was read, zero elsewhere, plus `add`.
template <class A>
struct ScatterStore {
  using T = Opmath<A>;
  static constexpr bool kTogether = true;
  const ProjectionArgs args; // by value: a reference would be read again after every store
  const int64_t aligned = kWholePanels;

  void finish(const T* tile, int64_t pitch, int64_t row, int rows, int64_t column, int64_t columns) {
    for (int r = 0; r < rows; ++r) {
      const OwnedPositions own(args, row + r);
      for (int64_t h = own.h; h < own.h_end; ++h) {
        for (int64_t w = own.w; w < own.w_end; ++w) {
          const int64_t at = own.offset(args, h, w) + column;
          const T* product = h == own.h && w == own.w ? tile + r * pitch : nullptr;
          args.add != nullptr ? position<true>(product, at, columns) : position<false>(product, at, columns);
        }
      }
    }
  }

  // The main branch's gradient that these rows will add.
  void ahead(LookAhead& look, int64_t row, int rows, int64_t, int64_t columns) const {
    if (args.add == nullptr || columns != args.channels) return;
    const OwnedPositions own(args, row);
    const int64_t bytes = rows * args.stride[1] * columns * static_cast<int64_t>(sizeof(A));
    for (int64_t h = own.h; h < own.h_end; ++h) {
      look.add(static_cast<const A*>(args.add) + own.offset(args, h, own.w), bytes);
    }
  }

  template <bool add>
  void position(const T* product, int64_t at, int64_t columns) {
    for_columns<A>(columns, args.streamed, [&](int64_t j, auto lanes) {
      Vec<T> v{};
      if (product != nullptr) v = load_vec(product + j);
      if constexpr (add) v += lanes.load(static_cast<const A*>(args.add) + at + j);
      lanes.store(static_cast<A*>(args.result) + at + j, v);
    });
  }
};

template <class A, int prologue>
void projection_dgrad_as(const ProjectionArgs& args, const ProjectionTask& task) {
  using T = Opmath<A>;
  const GradientRows<A, prologue> dy(args);
  const PlainRows<A> weight{static_cast<const A*>(args.weight), args.channels, args.outputs * args.channels};
  const auto pack = [&](T* block, Range columns, Range steps) {
    pack_right_by_depth(weight, block, columns.begin, columns.end, steps.begin, steps.end - steps.begin);
  };
  ScatterStore<A> store{args};
  const PackedOnDemand<T, decltype(pack)> right{pack};
  using Product = MultiplyRows<T, GradientRows<A, prologue>, decltype(right), ScatterStore<A>>;
  Product product(dy, right, store, task.workspace);
  product.run({task.rows[0], task.rows[1]}, {task.channels[0], task.channels[1]}, args.outputs);
  fence_streams();
}

template <class A, int prologue>
void projection_wgrad_as(const ProjectionArgs& args, const ProjectionTask& task) {
  using T = Opmath<A>;
  const GradientRows<A, prologue> dy(args);
  const GatheredRows<A> x(args);
  MultiplyColumns<T, GradientRows<A, prologue>, GatheredRows<A>> product(dy, x, task.workspace);
  product.run(static_cast<T*>(task.result), args.channels, {task.channels[0], task.channels[1]}, {0, args.channels},
              {task.rows[0], task.rows[1]}, task.sums);
}

// Calls kernel<A, prologue> for the prologue of args.
#define RESNET_FUSED_BY_PROLOGUE(kernel)               \
  switch (args.prologue) {                             \
    case kPlain:                                       \
      return kernel<A, kPlain>(args, task);            \
    case kScaled:                                      \
      return kernel<A, kScaled>(args, task);           \
    default:                                           \
      return kernel<A, kBatchStatistics>(args, task);  \
  }

template <class A>
void projection_dgrad(const ProjectionArgs& args, const ProjectionTask& task) {
  RESNET_FUSED_BY_PROLOGUE(projection_dgrad_as)
}

template <class A>
void projection_wgrad(const ProjectionArgs& args, const ProjectionTask& task) {
  RESNET_FUSED_BY_PROLOGUE(projection_wgrad_as)
}
