// Convolutions as matrix products: what is read is made while it is packed, what is written is finished while it is in
// the first-level cache. Templates over the stored type A. Included by convolutions.cpp only.

template <class T>
struct Unqualify {
  using type = T;
};
template <class T>
struct Unqualify<const T&> {
  using type = T;
};
template <class T>
using Unqualified = typename Unqualify<T>::type;

// Calls run(begin, end) for even bands of the task's points.
template <class Body>
ALWAYS_INLINE void for_bands(const ConvArgs& c, const ProjectionTask& task, const Body& run) {
  const Blocks bands(task.rows[0], task.rows[1], c.band, kWholePanels);
  for (int64_t b = bands.begin; b < bands.end; b = bands.stop(b)) run(Range{b, bands.stop(b)});
}

// Calls run(source) with what the images are.
template <class A, class Body>
ALWAYS_INLINE void with_source(const BnArgs& args, int kind, int64_t rows, int64_t channels, const Body& run) {
  switch (kind) {
    case kRaw:
      return run(ImageRows<A, kRaw>(args, rows, channels));
    case kNormalised:
      return run(ImageRows<A, kNormalised>(args, rows, channels));
    default:
      return run(ImageRows<A, kGradient>(args, rows, channels));
  }
}

template <class T>
int64_t whole_panels(int64_t columns) {
  return (columns + kPanelColumns<T> - 1) / kPanelColumns<T> * kPanelColumns<T>;
}

// The images' product with the packed filters: direct, or a band after another.
template <class A, class Store>
void convolve(const ConvArgs& c, const ProjectionTask& task, Store& store) {
  using T = Panel<A>;
  const TileSession session;
  using Right = PackedBefore<T>;
  const Right filters{static_cast<const T*>(c.packed), whole_panels<T>(c.outputs)};
  const Range columns{task.channels[0], task.channels[1]};
  const int64_t depth = c.filter[0] * c.filter[1] * c.channels;
  with_source<A>(c.image, c.kind, c.batch * c.in[0] * c.in[1], c.channels, [&](const auto& source) {
    if (c.band == 0) {
      MultiplyRows<T, Unqualified<decltype(source)>, Right, Store> product(source, filters, store, task.workspace);
      return product.run({task.rows[0], task.rows[1]}, columns, depth);
    }
    for_bands(c, task, [&](Range points) {
      Band<T> band(c, task, points);
      band.index(c, points);
      band.fill(c, source);
      MultiplyRows<T, Band<T>, Right, Store> product(band, filters, store, task.workspace);
      product.run(points, columns, depth);
    });
  });
  fence_streams();
}

// Panels [begin, end) of the filters, of all blocks of the depth; see PackedBefore.
template <class A>
void conv_pack(const ConvArgs& c, int64_t begin, int64_t end) {
  using T = Panel<A>;
  const int64_t depth = c.filter[0] * c.filter[1] * c.channels, columns = whole_panels<T>(c.outputs);
  const DepthBlocks deep(depth, deepest_block<T>(depth));
  const PlainRows<A> filters{static_cast<const A*>(c.weight), depth, c.outputs * depth};
  const MirroredFilters<A> mirrored(c);
  for (int64_t block = 0; block < deep.count; ++block) {
    const int64_t start = deep.start(block), steps = deep.start(block + 1) - start;
    const int64_t panel_elements = whole_steps<T>(steps) * kPanelColumns<T>;
    for (int64_t panel = begin; panel < end; ++panel) {
      const int64_t j = panel * kPanelColumns<T>, stop = j + kPanelColumns<T>;
      T* out = static_cast<T*>(c.packed) + start * columns + panel * panel_elements;
      if (c.is_mirrored) {
        pack_right_by_depth(mirrored, out, j, stop < c.outputs ? stop : c.outputs, start, steps);
      } else {
        pack_right_by_rows(filters, out, j, stop < c.outputs ? stop : c.outputs, start, steps);
      }
    }
  }
}

// Calls run(store) with what the forward writes.
template <class A, class Body>
ALWAYS_INLINE void with_forward_store(const ConvArgs& c, const ProjectionTask& task, const Body& run) {
  if (c.store.plain) {
    ForwardStore<A, true> store(c.store, task, task.sums);
    run(store);
  } else {
    ForwardStore<A, false> store(c.store, task, task.sums);
    run(store);
  }
}

template <class A>
void conv_fwd(const ConvArgs& c, const ProjectionTask& task) {
  with_forward_store<A>(c, task, [&](auto& store) { convolve<A>(c, task, store); });
}

constexpr int kMostFinished = 16; // rows that a store takes at once
static_assert(kPanelRows <= kMostFinished);

// The gradient of an image, with a second one added, masked by the ReLU it passes next, and the sums of the batch norm
// before that.
template <class A>
struct GradientStore {
  using T = Opmath<A>;
  using V = Vec<T>;
  static constexpr bool kTogether = true;
  const ConvArgs& conv;
  const BnArgs args; // by value: a reference would be read again after every store
  double* acc;       // planes: sum g, sum g * (y - mean), sum g * (residual - mean)
  const int64_t aligned = kWholePanels;

  GradientStore(const ConvArgs& c, double* sums) : conv(c), args(c.back), acc(sums) {}

  int64_t position(int64_t point) const {
    if (conv.grid_step[0] == 1 && conv.grid_step[1] == 1) return point;
    const int64_t P = conv.out[0], Q = conv.out[1], j = point % Q, i = point / Q % P, n = point / Q / P;
    return (n * conv.grid[0] + i * conv.grid_step[0] + conv.grid_start[0]) * conv.grid[1] + j * conv.grid_step[1] +
        conv.grid_start[1];
  }

  void finish(const T* tile, int64_t pitch, int64_t row, int rows, int64_t column, int64_t columns) {
    int64_t at[kMostFinished];
    for (int r = 0; r < rows; ++r) at[r] = position(row + r) * conv.outputs + column;
    for_columns<A>(columns, conv.streamed, [&](int64_t j, auto lanes) {
      args.y == nullptr ? plain(tile + j, pitch, at, rows, j, lanes)
                        : reduced(tile + j, pitch, at, rows, j, column + j, lanes);
    });
  }

  void ahead(LookAhead& look, int64_t row, int rows, int64_t, int64_t columns) const {
    if (conv.grid_step[0] != 1 || columns != conv.outputs) return;
    const void* read[] = {args.y, args.skip, args.out, args.residual};
    for (const void* tensor : read) {
      if (tensor == nullptr) continue;
      look.add(static_cast<const A*>(tensor) + row * columns, rows * columns * static_cast<int64_t>(sizeof(A)));
    }
  }

  template <class Lanes>
  ALWAYS_INLINE void plain(const T* tile, int64_t pitch, const int64_t* at, int rows, int64_t j, Lanes lanes) {
    for (int r = 0; r < rows; ++r) {
      V g = load_vec(tile + r * pitch);
      if (args.skip != nullptr) g += lanes.load(static_cast<const A*>(args.skip) + at[r] + j);
      lanes.store(static_cast<A*>(args.result) + at[r] + j, g);
    }
  }

  template <class Lanes>
  ALWAYS_INLINE void reduced(const T* tile, int64_t pitch, const int64_t* at, int rows, int64_t j, int64_t channel,
                             Lanes lanes) {
    const auto* planes = static_cast<const T*>(args.constants);
    const auto affine = Affine<V>::at(planes, args.plane, kMean, channel);
    const V residual_mean = load_vec(planes + (kSecond + kMean) * args.plane + channel);
    V sum_g{}, sum_gd{}, sum_gr{};
    for (int r = 0; r < rows; ++r) {
      const int64_t i = at[r] + j;
      const V y = lanes.load(static_cast<const A*>(args.y) + i);
      V g = load_vec(tile + r * pitch);
      if (args.skip != nullptr) g += lanes.load(static_cast<const A*>(args.skip) + i);
      if (args.out != nullptr) {
        g = zero_where_not_positive(lanes.load(static_cast<const A*>(args.out) + i), g);
      } else if (args.relu) {
        g = zero_where_not_positive(affine.z(y), g);
      }
      g = as_stored<A>(g);
      lanes.store(static_cast<A*>(args.result) + i, g);
      sum_g += g;
      sum_gd = fma(g, affine.centred(y), sum_gd);
      if (args.residual != nullptr) {
        sum_gr = fma(g, lanes.load(static_cast<const A*>(args.residual) + i) - residual_mean, sum_gr);
      }
    }
    accumulate(acc + channel, sum_g, whole(lanes));
    accumulate(acc + args.plane + channel, sum_gd, whole(lanes));
    if (args.residual != nullptr) accumulate(acc + 2 * args.plane + channel, sum_gr, whole(lanes));
  }

  static AllLanes whole(AllLanes) { return {}; }
  static SomeLanes whole(SomeLanes lanes) { return lanes; }
};

template <class A>
void conv_dgrad(const ConvArgs& c, const ProjectionTask& task) {
  GradientStore<A> store(c, task.sums);
  convolve<A>(c, task, store);
}

template <class A>
void conv_wgrad(const ConvArgs& c, const ProjectionTask& task) {
  using T = Panel<A>;
  const TileSession session;
  const Range outputs{task.channels[0], task.channels[1]};
  const int64_t run = c.filter[1] * c.channels, depth = c.filter[0] * run;
  auto* result = static_cast<Opmath<A>*>(task.result);
  with_source<A>(c.gradient, c.gradient_kind, c.batch * c.out[0] * c.out[1], c.outputs, [&](const auto& dy) {
    with_source<A>(c.image, c.kind, c.batch * c.in[0] * c.in[1], c.channels, [&](const auto& source) {
      using Dy = Unqualified<decltype(dy)>;
      if (c.band == 0) {
        MultiplyColumns<T, Dy, Unqualified<decltype(source)>> product(dy, source, task.workspace);
        return product.run(result, depth, outputs, {0, run}, {task.rows[0], task.rows[1]}, nullptr);
      }
      bool add = false;
      for_bands(c, task, [&](Range points) {
        Band<T> band(c, task, points);
        band.index(c, points);
        band.fill(c, source);
        MultiplyColumns<T, Dy, Band<T>> product(dy, band, task.workspace);
        product.run(result, depth, outputs, {0, run}, points, nullptr, add);
        add = true;
      });
    });
  });
}
