// Filters of 3x3 convolutions as Winograd's products take them: U = G g G', see winograd.h.
// Included by convolutions.cpp only.

constexpr int kSide = 4; // of a patch
constexpr int kPoints = kSide * kSide;
constexpr int64_t kPiece = 64; // channels of a panel that are transformed at once, from a copy in the caches

template <class T>
ALWAYS_INLINE void transform_filter(const Vec<T> (&g)[3][3], Vec<T> (&u)[kSide][kSide]) {
  const T half = static_cast<T>(0.5);
  Vec<T> rows[kSide][3];
#pragma GCC unroll 4
  for (int s = 0; s < 3; ++s) {
    const Vec<T> ends = g[0][s] + g[2][s];
    rows[0][s] = g[0][s];
    rows[1][s] = (ends + g[1][s]) * half;
    rows[2][s] = (ends - g[1][s]) * half;
    rows[3][s] = g[2][s];
  }
#pragma GCC unroll 4
  for (int r = 0; r < kSide; ++r) {
    const Vec<T> ends = rows[r][0] + rows[r][2];
    u[r][0] = rows[r][0];
    u[r][1] = (ends + rows[r][1]) * half;
    u[r][2] = (ends - rows[r][1]) * half;
    u[r][3] = rows[r][2];
  }
}

// U of the columns [begin, end): the 16 `pitch` elements apart, each in panels as deep as the channels.
template <class A>
void transform_filters(const ConvArgs& c, Range columns, Opmath<A>* out, int64_t pitch, void* workspace) {
  using T = Opmath<A>;
  constexpr int64_t W = kPanelColumns<T>;
  static_assert(9 * kPiece * W * sizeof(T) <= kWorkspaceBytes);
  const int64_t C = c.channels, taps = 9;
  const PlainRows<A> filters{static_cast<const A*>(c.weight), taps * C, c.outputs * taps * C};
  const MirroredFilters<A> mirrored(c);
  T* plain = static_cast<T*>(workspace);
  for (int64_t j = columns.begin; j < columns.end; j += W) {
    const int64_t stop = j + W < columns.end ? j + W : columns.end;
    for (int64_t d = 0; d < C; d += kPiece) {
      const int64_t steps = C - d < kPiece ? C - d : kPiece;
      for (int64_t tap = 0; tap < taps; ++tap) {
        T* to = plain + tap * kPiece * W;
        c.is_mirrored ? pack_right_by_depth(mirrored, to, j, stop, tap * C + d, steps)
                      : pack_right_by_rows(filters, to, j, stop, tap * C + d, steps);
      }
      T* panel = out + (j - columns.begin) * C + d * W;
      for (int64_t i = 0; i < steps * W; i += kLanes<T>) {
        Vec<T> g[3][3], u[kSide][kSide];
#pragma GCC unroll 9
        for (int t = 0; t < 9; ++t) g[t / 3][t % 3] = load_vec(plain + t * kPiece * W + i);
        transform_filter<T>(g, u);
#pragma GCC unroll 16
        for (int t = 0; t < kPoints; ++t) store_vec(panel + t * pitch + i, u[t / kSide][t % kSide]);
      }
    }
  }
}

// Panels [begin, end) of the filters, transformed, for all threads.
template <class A>
void winograd_pack(const ConvArgs& c, int64_t begin, int64_t end, void* workspace) {
  using T = Opmath<A>;
  const int64_t whole = end * kPanelColumns<T>, stop = whole < c.outputs ? whole : c.outputs;
  const int64_t first = begin * kPanelColumns<T>, pitch = c.channels * whole_panels<T>(c.outputs);
  transform_filters<A>(c, {first, stop}, static_cast<T*>(c.packed) + first * c.channels, pitch, workspace);
}
