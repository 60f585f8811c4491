// 4x4 patches of images, two points apart, as Winograd's products take them: V = B' d B, see winograd.h. Included by
// convolutions.cpp only.

// Bytes of a group: V, and M of a block of columns. More of them where the filters come from memory for every group.
constexpr int64_t kPatchBytes = (kVectorBytes == 64 ? 448 : 128) * 1024;
constexpr int64_t kManyPatchBytes = (kVectorBytes == 64 ? 1024 : 256) * 1024;
constexpr int64_t kBlockColumns = 64;
static_assert(kBlockColumns % kPanelColumns<float> == 0);

// The rows of patches of all images, one after another.
struct PatchGrid {
  int64_t height, width, across, down, rows;

  explicit PatchGrid(const ConvArgs& c)
      : height(c.out[0]),
        width(c.out[1]),
        across((width + 1) / 2),
        down((height + 1) / 2),
        rows(c.batch * down) {}

  // The first point of a row's results; those of rows that follow one another do, too.
  int64_t point(int64_t row) const { return line(row) * width; }
  int64_t line(int64_t row) const { return row / down * height + 2 * (row % down); }
  // Rows of the grid of points that a row of patches makes.
  int64_t made(int64_t row) const { return 2 * (row % down) + 1 < height ? 2 : 1; }
};

// Elements of one of the 16 of a patch: rows of a left panel.
template <class T>
int64_t patch_pitch(const ConvArgs& c) {
  return c.channels <= kMostShort<T> ? kShortPitch<T> : kRowPitch<T>;
}

// How many rows of patches are transformed together.
template <class T>
struct PatchGroup {
  int64_t most, rows;

  PatchGroup(const ConvArgs& c, const PatchGrid& grid, int64_t total) {
    constexpr int64_t element = sizeof(T);
    const int64_t bytes = kPoints * c.channels * c.outputs * element > kManyPatchBytes ? kManyPatchBytes : kPatchBytes;
    const int64_t fit = bytes / (kPoints * (c.channels + kBlockColumns) * element);
    const int64_t patches = fit < kMostPatches ? fit : kMostPatches;
    most = patches > grid.across ? patches / grid.across : 1;
    rows = most;
    int64_t least = -1;
    for (int64_t r = most; r > 0 && 2 * r >= most; --r) { // the fewest panels, and not too many groups
      const int64_t rest = total % r;
      const int64_t cost = total / r * (panels(r * grid.across) + 1) + (rest > 0 ? panels(rest * grid.across) + 1 : 0);
      if (least >= 0 && cost >= least) continue;
      least = cost;
      rows = r;
    }
  }

  static int64_t panels(int64_t patches) { return (patches + kPanelRows - 1) / kPanelRows; }
};

// Of four in a line: the rows of B'.
template <class V>
ALWAYS_INLINE void transform_line(V& a, V& b, V& c, V& d) {
  const V first = a - c, second = b + c, third = c - b, fourth = b - d;
  a = first;
  b = second;
  c = third;
  d = fourth;
}

// V of the rows [begin, end) of patches: a vector of channels of a patch at place(patch, channel), its 16 points `next`
// elements apart.
template <class T, class Place>
ALWAYS_INLINE void transform_patches(const ConvArgs& c, const PatchGrid& grid, const Band<T>& band, Range rows,
                                     int64_t next, const Place& place) {
  const int64_t C = c.channels, pitch = band.pitch();
  int64_t done = 0;
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    for (int64_t i = 0; i < grid.across; ++i, ++done) {
      const T* patch = band.row(grid.line(row)) + 2 * i * C;
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
          for (int s = 0; s < kSide; ++s) store_vec(place(done, j) + (r * kSide + s) * next, d[r][s]);
        }
      }
    }
  }
}

// Whether no result was NaN or infinite, of zero times all of them.
template <class V>
bool is_zero(const V& sum) {
  bool all = true;
  for (unsigned i = 0; i < sizeof(V) / sizeof(sum[0]); ++i) all = all && sum[i] == 0;
  return all;
}

// Calls run(band, rows) for even bands of the rows [begin, end) of patches, whole groups of them.
template <class T, class Source, class Body>
ALWAYS_INLINE void for_patch_bands(const ConvArgs& c, const ProjectionTask& task, const PatchGrid& grid, Range rows,
                                   int64_t unit, const Source& source, const Body& run) {
  const int64_t fit = c.band / (2 * c.out[1]) / unit * unit, step = fit > 0 ? fit : unit;
  for (int64_t row = rows.begin; row < rows.end; row += step) {
    const Range own{row, row + step < rows.end ? row + step : rows.end};
    Band<T> band(c, task, {grid.point(own.begin), grid.point(own.end)});
    band.fill(c, source);
    band.end_with_zeros();
    run(band, own);
  }
}
