// Max pool kernels on act(z), templates over the stored type A. Included by kernels.cpp only.
//
// Forward: act(z) is formed as y is loaded. Backward: the arg-max of a pooled row is recomputed from
// y when the first input row below it needs it and kept until the last one has used it, so that y is
// read from memory once and g, gathered over the windows of a pixel, is written once.

// The part [first, last) of window `p` that lies inside the input, along one axis.
struct Window {
  int64_t start, first, last;

  static Window at(int64_t p, int64_t kernel, int64_t stride, int64_t padding, int64_t size) {
    const int64_t start = p * stride - padding;
    const int64_t stop = start + kernel;
    return {start, start < 0 ? 0 : start, stop < size ? stop : size};
  }
};

// Calls step(j, lanes) for each vector of the C channels of a pixel.
template <class A, class Step>
inline void for_channels(int64_t channels, Step step) {
  int64_t j = 0;
  for (; j + kLanes<A> <= channels; j += kLanes<A>) step(j, AllLanes{});
  if (j < channels) step(j, SomeLanes{channels - j});
}

template <class V>
inline V lowest_of() {
  return V{} - __builtin_inff();
}

// The first of equal values stays, the last NaN wins.
template <class V>
inline auto takes_over(V value, V best) {
  return (value > best) | (value != value);
}

template <class A>
inline Affine<Vec<Opmath<A>>> pool_affine(const PoolArgs& args, int64_t j) {
  return Affine<Vec<Opmath<A>>>::at(static_cast<const Opmath<A>*>(args.constants), args.plane, kMean, j);
}

template <class A>
void pool_apply(const PoolArgs& args, int64_t begin, int64_t end) {
  using V = Vec<Opmath<A>>;
  const int64_t C = args.channels, H = args.in[0], W = args.in[1], P = args.pooled[0], Q = args.pooled[1];
  for (int64_t row = begin; row < end; ++row) {
    const A* image = static_cast<const A*>(args.y) + row / P * H * W * C;
    A* result = static_cast<A*>(args.result) + row * Q * C;
    const Window rows = Window::at(row % P, args.kernel[0], args.stride[0], args.padding[0], H);
    for (int64_t q = 0; q < Q; ++q) {
      const Window columns = Window::at(q, args.kernel[1], args.stride[1], args.padding[1], W);
      for_channels<A>(C, [&](int64_t j, auto lanes) {
        const auto affine = pool_affine<A>(args, j);
        V best = lowest_of<V>();
        for (int64_t h = rows.first; h < rows.last; ++h) {
          for (int64_t w = columns.first; w < columns.last; ++w) {
            const V z = affine.z(lanes.load(image + (h * W + w) * C + j));
            best = takes_over(z, best) ? z : best;
          }
        }
        lanes.store(result + q * C + j, args.relu ? zero_where_not_positive(best, best) : best);
      });
    }
  }
}

// The winner of each window of pooled row `p`, as (h - window's first row) * kernel width + (w - its
// first column), padding included.
template <class A, bool relu>
void find_arg_max(const PoolArgs& args, const A* image, int64_t p, Integer<A>* winners) {
  using V = Vec<Opmath<A>>;
  using Index = Vec<Integer<A>>;
  const int64_t C = args.channels, W = args.in[1], kernel_w = args.kernel[1];
  const Window rows = Window::at(p, args.kernel[0], args.stride[0], args.padding[0], args.in[0]);
  for (int64_t q = 0; q < args.pooled[1]; ++q) {
    const Window columns = Window::at(q, kernel_w, args.stride[1], args.padding[1], W);
    const int64_t corner = rows.start * kernel_w + columns.start;
    for_channels<A>(C, [&](int64_t j, auto lanes) {
      const auto affine = pool_affine<A>(args, j);
      V best = lowest_of<V>();
      Index winner = Index{} + static_cast<Integer<A>>(rows.first * kernel_w + columns.first - corner);
      for (int64_t h = rows.first; h < rows.last; ++h) {
        for (int64_t w = columns.first; w < columns.last; ++w) {
          const V z = affine.z(lanes.load(image + (h * W + w) * C + j));
          const V value = as_stored<A>(relu ? zero_where_not_positive(z, z) : z);
          const auto take = takes_over(value, best);
          best = take ? value : best;
          winner = take ? Index{} + static_cast<Integer<A>>(h * kernel_w + w - corner) : winner;
        }
      }
      store_raw(winners + q * args.plane + j, winner);
    });
  }
}

// The windows [first, last) that hold pixel `x` along one axis, of `pooled` windows.
struct Cover {
  int64_t first, last;

  static Cover at(int64_t x, int64_t kernel, int64_t stride, int64_t padding, int64_t pooled) {
    const int64_t below = x + padding - kernel;
    const int64_t last = (x + padding) / stride + 1;
    return {below < 0 ? 0 : below / stride + 1, last < pooled ? last : pooled};
  }
};

// One input row of g and its sums; winners of the pooled rows `cover` are in `slots`.
template <class A, bool relu>
void gather_row(const PoolArgs& args, int64_t image, int64_t h, Cover cover, const Integer<A>* slots, double* acc) {
  using V = Vec<Opmath<A>>;
  using Index = Vec<Integer<A>>;
  const int64_t C = args.channels, W = args.in[1], Q = args.pooled[1], kernel_w = args.kernel[1];
  const int64_t row = (image * args.in[0] + h) * W * C;
  const A* y = static_cast<const A*>(args.y) + row;
  A* result = static_cast<A*>(args.result) + row;
  const A* grad = static_cast<const A*>(args.grad) + image * args.pooled[0] * Q * C;
  for_channels<A>(C, [&](int64_t j, auto lanes) {
    const auto affine = pool_affine<A>(args, j);
    V sum_g = V{}, sum_gd = V{};
    for (int64_t w = 0; w < W; ++w) {
      const Cover columns = Cover::at(w, kernel_w, args.stride[1], args.padding[1], Q);
      V g = V{};
      for (int64_t p = cover.first; p < cover.last; ++p) {
        const Integer<A>* winners = slots + p % args.slots * Q * args.plane + j;
        const int64_t down = (h - p * args.stride[0] + args.padding[0]) * kernel_w;
        for (int64_t q = columns.first; q < columns.last; ++q) {
          const auto here = static_cast<Integer<A>>(down + w - q * args.stride[1] + args.padding[1]);
          const V won = lanes.load(grad + (p * Q + q) * C + j);
          g += load_raw<Index>(winners + q * args.plane) == here ? won : V{};
        }
      }
      const V value = lanes.load(y + w * C + j);
      g = as_stored<A>(relu ? zero_where_not_positive(affine.z(value), g) : g);
      lanes.store(result + w * C + j, g);
      sum_g += g;
      sum_gd = fma(g, affine.centred(value), sum_gd);
    }
    accumulate(acc + j, sum_g, lanes);
    accumulate(acc + args.plane + j, sum_gd, lanes);
  });
}

template <class A, bool relu>
void pool_bwd_as(const PoolArgs& args, int64_t begin, int64_t end, double* acc, void* indices, int64_t* held) {
  const int64_t H = args.in[0], P = args.pooled[0];
  Integer<A>* slots = static_cast<Integer<A>*>(indices);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t image = row / H, h = row % H;
    const Cover cover = Cover::at(h, args.kernel[0], args.stride[0], args.padding[0], P);
    for (int64_t p = cover.first; p < cover.last; ++p) {
      const int64_t slot = p % args.slots;
      if (held[slot] == image * P + p) continue;
      const A* y = static_cast<const A*>(args.y) + image * H * args.in[1] * args.channels;
      find_arg_max<A, relu>(args, y, p, slots + slot * args.pooled[1] * args.plane);
      held[slot] = image * P + p;
    }
    gather_row<A, relu>(args, image, h, cover, slots, acc);
  }
}

template <class A>
void pool_bwd(const PoolArgs& args, int64_t begin, int64_t end, double* acc, void* indices, int64_t* held) {
  args.relu ? pool_bwd_as<A, true>(args, begin, end, acc, indices, held)
            : pool_bwd_as<A, false>(args, begin, end, acc, indices, held);
}
