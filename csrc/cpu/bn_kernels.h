// Batch norm kernels, templates over the stored type A. Included by kernels.cpp only.
//
// Every kernel reads each operand once. Groups of rows are kept in registers, column by column:
// constants are loaded once per group, sums are float inside a group and double between groups.

// As many rows as leave registers for the rest of the arithmetic.
constexpr int kStatsRows = kVectorBytes == 64 ? 16 : 8;

// Mean and M2 by groups of rows: two passes over a group in registers, relative to its first row so
// that a mean much larger than the deviation loses nothing, then Chan's merge in double. There the
// means are kept relative to `origin`, for double activations their first row; float needs none.
template <class A>
struct StatsBody {
  using V = Vec<Opmath<A>>;
  static constexpr int kHalves = sizeof(double) / sizeof(Opmath<A>);
  const A* y;
  double* mean;
  double* m2;
  const double* origin;
  int64_t width;
  double rows = 0;   // merged, those of the current group included
  double share = 0;  // of the current group in them
  double weight = 0; // of its squared distance in M2

  void start_rows(int count) {
    share = count / (rows + count);
    weight = rows * share;
    rows += count;
  }

  template <int G, class Lanes>
  ALWAYS_INLINE void step(int64_t i, int64_t j, Lanes lanes) {
    V v[G], sum = V{}, square = V{};
    for (int r = 0; r < G; ++r) v[r] = lanes.load(y + i + r * width);
    const V first_row = v[0];
    for (int r = 0; r < G; ++r) {
      v[r] -= first_row;
      sum += v[r];
    }
    sum *= static_cast<Opmath<A>>(1.0 / G);
    for (int r = 0; r < G; ++r) {
      v[r] -= sum;
      square = fma(v[r], v[r], square);
    }
    Doubles first[kHalves], offset[kHalves], spread[kHalves];
    widen(first_row, first);
    widen(sum, offset);
    widen(square, spread);
    for (int h = 0; h < kHalves; ++h) {
      const int64_t column = j + h * kLanes<double>;
      if constexpr (kHalves == 1) first[h] -= load_vec(origin + column);
      merge(column, first[h] + offset[h], spread[h], lanes, h);
    }
  }

  void merge(int64_t j, Doubles group_mean, Doubles group_m2, AllLanes, int) {
    const Doubles delta = group_mean - load_vec(mean + j);
    store_vec(mean + j, load_vec(mean + j) + delta * share);
    store_vec(m2 + j, load_vec(m2 + j) + group_m2 + delta * (delta * weight));
  }
  void merge(int64_t j, Doubles group_mean, Doubles group_m2, SomeLanes lanes, int half) {
    for (int64_t l = 0; l < kLanes<double> && half * kLanes<double> + l < lanes.count; ++l) {
      const double delta = group_mean[l] - mean[j + l];
      mean[j + l] += delta * share;
      m2[j + l] += group_m2[l] + delta * (delta * weight);
    }
  }
};

template <class A>
void stats(const BnArgs& args, int64_t begin, int64_t end, double* acc) {
  const A* y = static_cast<const A*>(args.y);
  double* origin = acc + 2 * args.plane;
  if constexpr (sizeof(A) == sizeof(double)) {
    for (int64_t j = 0; j < args.width && begin + j < end; ++j) origin[j] = y[begin + j];
  }
  StatsBody<A> body{y, acc, acc + args.plane, origin, args.width};
  traverse<A, kStatsRows>(args.width, begin, end, body);
}

template <class A, int shortcut, bool relu>
struct ApplyBody : BodyBase {
  using V = Vec<Opmath<A>>;
  const BnArgs args;  // by value: a reference would be read again after every store
  explicit ApplyBody(const BnArgs& a) : args(a) {}

  template <int G, class Lanes>
  ALWAYS_INLINE void step(int64_t i, int64_t j, Lanes lanes) {
    const auto* planes = static_cast<const Opmath<A>*>(args.constants);
    const auto affine = Affine<V>::at(planes, args.plane, kMean, j);
    Affine<V> second{};
    if constexpr (shortcut == kProjectionShortcut) second = Affine<V>::at(planes, args.plane, kSecond, j);
    for (int r = 0; r < G; ++r, i += args.width) {
      V z = affine.z(lanes.load(static_cast<const A*>(args.y) + i));
      if constexpr (shortcut != kNoShortcut) {
        const V residual = lanes.load(static_cast<const A*>(args.residual) + i);
        // Each term is rounded as the stock modules store it, so that the sign of the sum is theirs.
        z = as_stored<A>(z) + (shortcut == kProjectionShortcut ? as_stored<A>(second.z(residual)) : residual);
      }
      lanes.store(static_cast<A*>(args.result) + i, relu ? zero_where_not_positive(z, z) : z);
    }
  }
};

template <class A, int shortcut, bool relu>
void apply_as(const BnArgs& args, int64_t begin, int64_t end) {
  ApplyBody<A, shortcut, relu> body(args);
  traverse<A, 1>(args.width, begin, end, body);
}

template <class A>
void apply(const BnArgs& args, int64_t begin, int64_t end, double*) {
  switch (args.shortcut) {
    case kNoShortcut:
      return args.relu ? apply_as<A, kNoShortcut, true>(args, begin, end)
                       : apply_as<A, kNoShortcut, false>(args, begin, end);
    case kPlainShortcut:
      return args.relu ? apply_as<A, kPlainShortcut, true>(args, begin, end)
                       : apply_as<A, kPlainShortcut, false>(args, begin, end);
    default:
      return args.relu ? apply_as<A, kProjectionShortcut, true>(args, begin, end)
                       : apply_as<A, kProjectionShortcut, false>(args, begin, end);
  }
}

// Sums of g and g * (y - mean); `rebuild` also writes act(z), as the forward stored it.
template <class A, bool relu, bool rebuild>
struct BwdReduceBody : BodyBase {
  using V = Vec<Opmath<A>>;
  const BnArgs args;  // by value: a reference would be read again after every store
  double* acc;
  BwdReduceBody(const BnArgs& a, double* sums) : args(a), acc(sums) {}

  template <int G, class Lanes>
  ALWAYS_INLINE void step(int64_t i, int64_t j, Lanes lanes) {
    const auto affine = Affine<V>::at(static_cast<const Opmath<A>*>(args.constants), args.plane, kMean, j);
    V sum_g = V{}, sum_gd = V{};
    for (int r = 0; r < G; ++r, i += args.width) {
      const V y = lanes.load(static_cast<const A*>(args.y) + i);
      V g = lanes.load(static_cast<const A*>(args.grad) + i);
      if constexpr (relu || rebuild) {
        const V z = affine.z(y);
        if constexpr (rebuild) {
          lanes.store(static_cast<A*>(args.result) + i, relu ? zero_where_not_positive(z, z) : z);
        }
        if constexpr (relu) g = zero_where_not_positive(z, g);
      }
      sum_g += g;
      sum_gd = fma(g, affine.centred(y), sum_gd);
    }
    accumulate(acc + j, sum_g, lanes);
    accumulate(acc + args.plane + j, sum_gd, lanes);
  }
};

template <class A, bool relu, bool rebuild>
void bwd_reduce_as(const BnArgs& args, int64_t begin, int64_t end, double* acc) {
  BwdReduceBody<A, relu, rebuild> body(args, acc);
  traverse<A, 4>(args.width, begin, end, body);
}

template <class A>
void bwd_reduce(const BnArgs& args, int64_t begin, int64_t end, double* acc) {
  if (args.result != nullptr) {
    args.relu ? bwd_reduce_as<A, true, true>(args, begin, end, acc)
              : bwd_reduce_as<A, false, true>(args, begin, end, acc);
  } else {
    args.relu ? bwd_reduce_as<A, true, false>(args, begin, end, acc)
              : bwd_reduce_as<A, false, false>(args, begin, end, acc);
  }
}

// g = (grad + skip) masked by out, written once; its sums against y and against a projection's output.
template <class A, bool has_skip, bool has_out, bool has_residual>
struct JoinBody : BodyBase {
  using V = Vec<Opmath<A>>;
  const BnArgs args;  // by value: a reference would be read again after every store
  double* acc;
  JoinBody(const BnArgs& a, double* sums) : args(a), acc(sums) {}

  template <int G, class Lanes>
  ALWAYS_INLINE void step(int64_t i, int64_t j, Lanes lanes) {
    const auto* planes = static_cast<const Opmath<A>*>(args.constants);
    const V mean = load_vec(planes + kMean * args.plane + j);
    V residual_mean = V{};
    if constexpr (has_residual) residual_mean = load_vec(planes + (kSecond + kMean) * args.plane + j);
    V sum_g = V{}, sum_gd = V{}, sum_gr = V{};
    for (int r = 0; r < G; ++r, i += args.width) {
      V g = lanes.load(static_cast<const A*>(args.grad) + i);
      if constexpr (has_skip) g += lanes.load(static_cast<const A*>(args.skip) + i);
      if constexpr (has_out) g = zero_where_not_positive(lanes.load(static_cast<const A*>(args.out) + i), g);
      if constexpr (has_skip) g = as_stored<A>(g);
      lanes.store(static_cast<A*>(args.result) + i, g);
      sum_g += g;
      sum_gd = fma(g, lanes.load(static_cast<const A*>(args.y) + i) - mean, sum_gd);
      if constexpr (has_residual) {
        sum_gr = fma(g, lanes.load(static_cast<const A*>(args.residual) + i) - residual_mean, sum_gr);
      }
    }
    accumulate(acc + j, sum_g, lanes);
    accumulate(acc + args.plane + j, sum_gd, lanes);
    if constexpr (has_residual) accumulate(acc + 2 * args.plane + j, sum_gr, lanes);
  }
};

template <class A, bool has_skip, bool has_out, bool has_residual>
void join_as(const BnArgs& args, int64_t begin, int64_t end, double* acc) {
  JoinBody<A, has_skip, has_out, has_residual> body(args, acc);
  traverse<A, 4>(args.width, begin, end, body);
}

template <class A>
void join_bwd_reduce(const BnArgs& args, int64_t begin, int64_t end, double* acc) {
  static constexpr BnKernel variants[8] = {
      join_as<A, false, false, false>, join_as<A, true, false, false>, join_as<A, false, true, false>,
      join_as<A, true, true, false>,   join_as<A, false, false, true>, join_as<A, true, false, true>,
      join_as<A, false, true, true>,   join_as<A, true, true, true>};
  variants[(args.skip != nullptr) + 2 * (args.out != nullptr) + 4 * (args.residual != nullptr)](args, begin, end, acc);
}

// dy = a * g + b * (y - mean) + c, or a * g of running statistics, with g masked by z first where there
// is a ReLU.
template <class A, bool relu, bool training>
struct BwdApplyBody : BodyBase {
  using V = Vec<Opmath<A>>;
  const BnArgs args;  // by value: a reference would be read again after every store
  explicit BwdApplyBody(const BnArgs& a) : args(a) {}

  template <int G, class Lanes>
  ALWAYS_INLINE void step(int64_t i, int64_t j, Lanes lanes) {
    const auto* planes = static_cast<const Opmath<A>*>(args.constants);
    const auto affine = Affine<V>::at(planes, args.plane, kMean, j);
    const V a = load_vec(planes + kSecond * args.plane + j);
    V b{}, c{};
    if constexpr (training) {
      b = load_vec(planes + (kSecond + 1) * args.plane + j);
      c = load_vec(planes + (kSecond + 2) * args.plane + j);
    }
    for (int r = 0; r < G; ++r, i += args.width) {
      V g = lanes.load(static_cast<const A*>(args.grad) + i), y{};
      if constexpr (relu || training) y = lanes.load(static_cast<const A*>(args.y) + i);
      if constexpr (relu) g = zero_where_not_positive(affine.z(y), g);
      lanes.store(static_cast<A*>(args.result) + i, training ? fma(a, g, fma(b, affine.centred(y), c)) : a * g);
    }
  }
};

template <class A, bool relu, bool training>
void bwd_apply_as(const BnArgs& args, int64_t begin, int64_t end) {
  BwdApplyBody<A, relu, training> body(args);
  traverse<A, 1>(args.width, begin, end, body);
}

template <class A>
void bwd_apply(const BnArgs& args, int64_t begin, int64_t end, double*) {
  if (args.training) {
    args.relu ? bwd_apply_as<A, true, true>(args, begin, end) : bwd_apply_as<A, false, true>(args, begin, end);
  } else {
    args.relu ? bwd_apply_as<A, true, false>(args, begin, end) : bwd_apply_as<A, false, false>(args, begin, end);
  }
}
