// What the projection's matrix products read: prologues that gather, convert and differentiate, as sources of
// gemm_pack.h, templates over the stored type A. Included by kernels.cpp only.

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

// x at the positions read.
template <class A>
struct GatheredRows {
  using Stored = A;
  const ProjectionArgs& args;
  const A* x;
  int64_t elements, rows;
  bool is_dense;

  explicit GatheredRows(const ProjectionArgs& a)
      : args(a),
        x(static_cast<const A*>(a.x)),
        elements(a.batch * a.in[0] * a.in[1] * a.channels),
        rows(a.batch * a.out[0] * a.out[1]),
        is_dense(a.stride[0] == 1 && a.stride[1] == 1) {}

  int64_t offset(int64_t row) const {
    if (is_dense) return row * args.channels;
    const OwnedPositions at(args, row);
    return at.offset(args, at.h, at.w);
  }
  char column(int64_t) const { return 0; }
  template <class Lanes>
  auto load(char, int64_t at, Lanes lanes) const {
    return lanes.load(x + at);
  }
  void prefetch(int64_t at) const { __builtin_prefetch(x + at); }
  int64_t parts() const { return 1; }
  const GatheredRows& part(int64_t) const { return *this; }
  void ahead(LookAhead& look, int64_t row, int count, int64_t first, int64_t depth) const {
    for (int64_t r = row; r < row + count && r < rows; ++r) look.add(x + offset(r) + first, depth * sizeof(A));
  }
  void region(LookAhead& look, int64_t row, int64_t count, int64_t columns) const {
    if (is_dense && columns == args.channels) look.add(x + row * columns, count * columns * sizeof(A));
  }
};

// dy of g, y: as it is, by a factor, or a * g + b * (y - mean) + c.
template <class A, int prologue>
struct GradientRows {
  using Stored = A;
  using T = Opmath<A>;
  using V = Vec<T>;
  struct Column {
    V a, b, mean, c;
  };
  const A* g;
  const A* y;
  const T* planes;
  int64_t plane, pitch, elements;

  explicit GradientRows(const ProjectionArgs& args)
      : g(static_cast<const A*>(args.g)),
        y(static_cast<const A*>(args.y)),
        planes(static_cast<const T*>(args.constants)),
        plane(args.plane),
        pitch(args.outputs),
        elements(args.batch * args.out[0] * args.out[1] * args.outputs) {}

  int64_t offset(int64_t row) const { return row * pitch; }
  Column column(int64_t j) const {
    Column own{};
    if constexpr (prologue != kPlain) own.a = load_vec(planes + kFactorG * plane + j);
    if constexpr (prologue == kBatchStatistics) {
      own.b = load_vec(planes + kFactorY * plane + j);
      own.mean = load_vec(planes + kMeanY * plane + j);
      own.c = load_vec(planes + kConstant * plane + j);
    }
    return own;
  }
  template <class Lanes>
  V load(const Column& own, int64_t at, Lanes lanes) const {
    V dy = lanes.load(g + at);
    if constexpr (prologue == kScaled) dy = own.a * dy;
    if constexpr (prologue == kBatchStatistics) dy = fma(own.a, dy, fma(own.b, lanes.load(y + at) - own.mean, own.c));
    return dy;
  }
  void prefetch(int64_t at) const {
    __builtin_prefetch(g + at);
    if constexpr (prologue == kBatchStatistics) __builtin_prefetch(y + at);
  }
  // Whole rows only, which follow one another.
  void ahead(LookAhead& look, int64_t row, int count, int64_t, int64_t depth) const {
    if (depth == pitch && row * pitch < elements) region(look, row, count, depth);
  }
  void region(LookAhead& look, int64_t row, int64_t count, int64_t columns) const {
    if (columns != pitch) return;
    look.add(g + row * pitch, count * pitch * sizeof(A));
    if constexpr (prologue == kBatchStatistics) look.add(y + row * pitch, count * pitch * sizeof(A));
  }
};
