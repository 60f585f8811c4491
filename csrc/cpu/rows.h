// Walking the rows of an activation, and the affine of a column: what all the kernels share.
// Included by kernels.cpp only.

// Calls body.step<G>(offset, column, lanes) for G rows at a time, `width` elements apart, over the
// elements [begin, end); the last row may be cut short. body.start_rows(G) comes before their columns.
template <class A, int G, class Body>
inline void traverse(int64_t width, int64_t begin, int64_t end, Body& body) {
  constexpr int64_t W = kLanes<A>;
  const int64_t whole = width - width % W;
  int64_t i = begin;
  for (; i + G * width <= end; i += G * width) {
    body.start_rows(G);
    for (int64_t j = 0; j < whole; j += W) body.template step<G>(i + j, j, AllLanes{});
    if (whole < width) body.template step<G>(i + whole, whole, SomeLanes{width - whole});
  }
  for (; i + width <= end; i += width) {
    body.start_rows(1);
    for (int64_t j = 0; j < whole; j += W) body.template step<1>(i + j, j, AllLanes{});
    if (whole < width) body.template step<1>(i + whole, whole, SomeLanes{width - whole});
  }
  const int64_t rest = end - i;
  body.start_rows(1);
  int64_t j = 0;
  for (; j + W <= rest; j += W) body.template step<1>(i + j, j, AllLanes{});
  if (j < rest) body.template step<1>(i + j, j, SomeLanes{rest - j});
}

// One vector of columns of the affine z = scale * (y - mean) + shift: the only place it is evaluated.
template <class V>
struct Affine {
  V mean, scale, shift;

  template <class T>
  static Affine at(const T* planes, int64_t plane, int first, int64_t j) {
    return {load_vec(planes + (first + kMean) * plane + j), load_vec(planes + (first + kScale) * plane + j),
            load_vec(planes + (first + kShift) * plane + j)};
  }
  V centred(V y) const { return y - mean; }
  V z(V y) const { return fma(scale, centred(y), shift); }
};

// acc += v, in double, lane by lane.
inline void accumulate(double* acc, Floats v, AllLanes) {
  Doubles halves[2];
  widen(v, halves);
  store_vec(acc, load_vec(acc) + halves[0]);
  store_vec(acc + kLanes<double>, load_vec(acc + kLanes<double>) + halves[1]);
}
inline void accumulate(double* acc, Doubles v, AllLanes) { store_vec(acc, load_vec(acc) + v); }
template <class V>
inline void accumulate(double* acc, V v, SomeLanes lanes) {
  for (int64_t i = 0; i < lanes.count; ++i) acc[i] += static_cast<double>(v[i]);
}

struct BodyBase {
  void start_rows(int) {}
};
