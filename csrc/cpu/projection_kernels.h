// What surrounds the projection's matrix products, templates over the stored type A: gathering and converting
// rows before them, writing rows after them. Included by kernels.cpp only.

// Calls body(column, lanes) over `count` columns.
template <class A, class Body>
ALWAYS_INLINE void for_columns(int64_t count, const Body& body) {
  int64_t j = 0;
  for (; j + kLanes<A> <= count; j += kLanes<A>) body(j, AllLanes{});
  if (j < count) body(j, SomeLanes{count - j});
}

// A row of the flattened (N, P, Q), and the positions of (N, H, W) that it owns: up to `stride` each way.
struct OwnedPositions {
  int64_t n, h, w, h_end, w_end;

  OwnedPositions(const ProjectionArgs& args, int64_t row) {
    const int64_t P = args.out[0], Q = args.out[1], q = row % Q, p = row / Q % P;
    n = row / Q / P;
    h = p * args.stride[0];
    w = q * args.stride[1];
    h_end = p + 1 < P ? h + args.stride[0] : args.in[0];
    w_end = q + 1 < Q ? w + args.stride[1] : args.in[1];
  }
  int64_t offset(const ProjectionArgs& args, int64_t at_h, int64_t at_w) const {
    return ((n * args.in[0] + at_h) * args.in[1] + at_w) * args.channels;
  }
};

template <class A>
void projection_gather(const ProjectionArgs& args, int64_t begin, int64_t end, double*) {
  auto* product = static_cast<Opmath<A>*>(args.product);
  for (int64_t row = begin; row < end; ++row, product += args.channels) {
    const OwnedPositions at(args, row);
    const A* source = static_cast<const A*>(args.source) + at.offset(args, at.h, at.w);
    for_columns<A>(args.channels, [&](int64_t j, auto lanes) { lanes.store(product + j, lanes.load(source + j)); });
  }
}

template <class A, int prologue>
void projection_gradient_as(const ProjectionArgs& args, int64_t begin, int64_t end, double* acc) {
  const auto* planes = static_cast<const Opmath<A>*>(args.constants);
  auto* product = static_cast<Opmath<A>*>(args.product);
  const auto plane = [&](int which, int64_t j) { return load_vec(planes + which * args.plane + j); };
  for (int64_t row = begin; row < end; ++row, product += args.channels) {
    const int64_t first = row * args.channels;
    for_columns<A>(args.channels, [&](int64_t j, auto lanes) {
      auto dy = lanes.load(static_cast<const A*>(args.source) + first + j);
      if constexpr (prologue == kScaled) dy = plane(kFactorG, j) * dy;
      if constexpr (prologue == kBatchStatistics) {
        const auto y = lanes.load(static_cast<const A*>(args.y) + first + j);
        dy = fma(plane(kFactorG, j), dy, fma(plane(kFactorY, j), y - plane(kMeanY, j), plane(kConstant, j)));
      }
      lanes.store(product + j, dy);
      if (acc != nullptr) accumulate(acc + j, dy, lanes);
    });
  }
}

template <class A>
void projection_gradient(const ProjectionArgs& args, int64_t begin, int64_t end, double* acc) {
  switch (args.prologue) {
    case kPlain:
      return projection_gradient_as<A, kPlain>(args, begin, end, acc);
    case kScaled:
      return projection_gradient_as<A, kScaled>(args, begin, end, acc);
    default:
      return projection_gradient_as<A, kBatchStatistics>(args, begin, end, acc);
  }
}

template <class A>
void projection_finish(const ProjectionArgs& args, int64_t begin, int64_t end, double*) {
  const auto* planes = static_cast<const Opmath<A>*>(args.constants);
  const auto* product = static_cast<const Opmath<A>*>(args.product);
  for (int64_t row = begin; row < end; ++row, product += args.channels) {
    const int64_t first = row * args.channels;
    for_columns<A>(args.channels, [&](int64_t j, auto lanes) {
      auto z = lanes.load(product + j) + load_vec(planes + kBias * args.plane + j);
      using V = decltype(z);
      if (args.has_affine) z = Affine<V>::at(planes, args.plane, kOwnMean, j).z(z);
      if (args.add != nullptr) {
        const V add = lanes.load(static_cast<const A*>(args.add) + first + j);
        z += args.has_add_affine ? Affine<V>::at(planes, args.plane, kAddMean, j).z(add) : add;
      }
      if (args.relu) z = zero_where_not_positive(z, z);
      lanes.store(static_cast<A*>(args.result) + first + j, z);
    });
  }
}

template <class A>
void projection_scatter(const ProjectionArgs& args, int64_t begin, int64_t end, double*) {
  const auto* product = static_cast<const Opmath<A>*>(args.product);
  for (int64_t row = begin; row < end; ++row, product += args.channels) {
    const OwnedPositions own(args, row);
    for (int64_t h = own.h; h < own.h_end; ++h) {
      for (int64_t w = own.w; w < own.w_end; ++w) {
        const int64_t at = own.offset(args, h, w);
        const bool read = h == own.h && w == own.w;
        for_columns<A>(args.channels, [&](int64_t j, auto lanes) {
          Vec<Opmath<A>> v{};
          if (read) v = lanes.load(product + j);
          if (args.add != nullptr) v += lanes.load(static_cast<const A*>(args.add) + at + j);
          lanes.store(static_cast<A*>(args.result) + at + j, v);
        });
      }
    }
  }
}
