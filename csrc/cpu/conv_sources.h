// What a convolution multiplies, as sources of gemm_pack.h, templates over the stored type A: images that are
// normalised or differentiated while they are read, patches of them, and filters. Included by convolutions.cpp only.
//
// A 1x1 reads its images where they are. Any other filter reads patches from a band: the images of some points of the
// grid, made once, with their padding, so that a patch is `filter[0]` runs of filter[1] * channels elements.

// Elements of an image: y, act(z(y)), or the gradient of y from grad, which is masked where z is not positive.
template <class A, int kind>
struct ImageRows {
  using Stored = A;
  using T = Opmath<A>;
  using V = Vec<T>;
  static constexpr bool kPlain = kind == kRaw;
  struct Column {
    Affine<V> affine;
    V a, b, c;
  };
  const BnArgs args; // by value: a reference would be read again after every store
  int64_t pitch, elements;

  ImageRows(const BnArgs& a, int64_t rows, int64_t channels) : args(a), pitch(channels), elements(rows * channels) {}

  int64_t offset(int64_t row) const { return row * pitch; }
  Column column(int64_t j) const {
    Column own{};
    if constexpr (kind == kRaw) return own;
    const auto* planes = static_cast<const T*>(args.constants);
    own.affine = Affine<V>::at(planes, args.plane, kMean, j);
    if constexpr (kind == kGradient) {
      own.a = load_vec(planes + kSecond * args.plane + j);
      own.b = load_vec(planes + (kSecond + 1) * args.plane + j);
      own.c = load_vec(planes + (kSecond + 2) * args.plane + j);
    }
    return own;
  }
  template <class Lanes>
  ALWAYS_INLINE V load(const Column& own, int64_t at, Lanes lanes) const {
    if constexpr (kind == kRaw) return lanes.load(static_cast<const A*>(args.y) + at);
    if constexpr (kind == kNormalised) {
      const V z = own.affine.z(lanes.load(static_cast<const A*>(args.y) + at));
      return args.relu ? zero_where_not_positive(z, z) : z;
    }
    if constexpr (kind == kGradient) {
      V g = lanes.load(static_cast<const A*>(args.grad) + at);
      if (!args.relu && !args.training) return own.a * g;
      const V y = lanes.load(static_cast<const A*>(args.y) + at);
      if (args.relu) g = zero_where_not_positive(own.affine.z(y), g);
      return args.training ? fma(own.a, g, fma(own.b, own.affine.centred(y), own.c)) : own.a * g;
    }
  }
  void prefetch(int64_t at) const {
    __builtin_prefetch(static_cast<const A*>(args.y) + at);
    if constexpr (kind == kGradient) __builtin_prefetch(static_cast<const A*>(args.grad) + at);
  }
  int64_t parts() const { return 1; }
  const ImageRows& part(int64_t) const { return *this; }
  void ahead(LookAhead& look, int64_t row, int count, int64_t first, int64_t depth) const {
    if (row * pitch >= elements) return;
    if (depth == pitch) return region(look, row, count, depth);
    for (int64_t r = row; r < row + count; ++r) look.add(at(args.y, r) + first * sizeof(A), depth * sizeof(A));
  }
  // Whole rows only, which follow one another.
  void region(LookAhead& look, int64_t row, int64_t count, int64_t columns) const {
    if (columns != pitch) return;
    look.add(at(args.y, row), count * pitch * sizeof(A));
    if (kind == kGradient) look.add(at(args.grad, row), count * pitch * sizeof(A));
  }

 private:
  const char* at(const void* tensor, int64_t row) const {
    return static_cast<const char*>(tensor) + row * pitch * sizeof(A);
  }
};

// Points [begin, end) of the grid, and the padded rows of the images that their patches meet.
template <class T>
class Band {
 public:
  using Stored = T;

  Band(const ConvArgs& c, const ProjectionTask& task, Range points)
      : data_(static_cast<T*>(task.band)),
        offsets_(task.offsets),
        first_(points.begin),
        down_(c.out[0]),
        step_(c.stride[0]),
        padded_{(c.out[0] - 1) * c.stride[0] + c.filter[0], (c.out[1] - 1) * c.stride[1] + c.filter[1]},
        run_(c.filter[1] * c.channels),
        pitch_(padded_[1] * c.channels),
        runs_(c.filter[0]),
        low_(padded_row(points.begin / c.out[1])),
        rows_(padded_row((points.end - 1) / c.out[1]) - low_ + runs_) {}

  // Finds where the patches of its points begin, for `offset`.
  void index(const ConvArgs& c, Range points) {
    const int64_t Q = c.out[1], P = c.out[0];
    int64_t q = points.begin % Q, p = points.begin / Q % P, n = points.begin / Q / P;
    int64_t at = q * c.stride[1] * c.channels, row = 0;
    for (int64_t i = points.begin; i < points.end; ++i) {
      offsets_[i - first_] = static_cast<int32_t>(row * pitch_ + at);
      at += c.stride[1] * c.channels;
      if (i + 1 < points.end && ++q == Q) {
        q = 0;
        at = 0;
        if (++p == P) p = 0, ++n;
        row = n * padded_[0] + p * c.stride[0] - low_;
      }
    }
  }

  // The rows from an image source, zero outside the images.
  template <class Source>
  void fill(const ConvArgs& c, const Source& source) {
    const int64_t W = c.in[1], C = c.channels, skipped = c.before[1] < 0 ? -c.before[1] : 0;
    const int64_t left = c.before[1] > 0 ? c.before[1] : 0;
    const int64_t room = padded_[1] - left, width = W - skipped < room ? W - skipped : room;
    for (int64_t t = 0; t < rows_; ++t) {
      T* out = data_ + t * pitch_;
      const int64_t n = (low_ + t) / padded_[0], h = (low_ + t) % padded_[0] - c.before[0];
      if (h < 0 || h >= c.in[0] || width <= 0 || left >= padded_[1]) {
        zero(out, pitch_);
        continue;
      }
      zero(out, left * C);
      copy(source, out + left * C, ((n * c.in[0] + h) * W + skipped) * C, width, C);
      zero(out + (left + width) * C, (room - width) * C);
    }
  }

  // A row more than the points have, and the pixels that follow it: for patches that are larger than the filter.
  void end_with_zeros() { zero(data_ + rows_ * pitch_, pitch_ + run_); }

  int64_t offset(int64_t point) const { return offsets_[point - first_]; }
  // The patch of the first point of a row of the flattened (N, P).
  const T* row(int64_t row) const { return data_ + (padded_row(row) - low_) * pitch_; }
  const T* data() const { return data_; }
  int64_t runs() const { return runs_; }
  int64_t run() const { return run_; }
  int64_t pitch() const { return pitch_; }
  void ahead(LookAhead&, int64_t, int, int64_t, int64_t) const {}

  // One run of every patch, as columns.
  struct Run {
    using Stored = T;
    const Band& band;
    const T* data;
    int64_t elements;

    int64_t offset(int64_t point) const { return band.offset(point); }
    char column(int64_t) const { return 0; }
    template <class Lanes>
    auto load(char, int64_t at, Lanes lanes) const {
      return lanes.load(data + at);
    }
    void prefetch(int64_t) const {}
  };
  int64_t parts() const { return runs_; }
  Run part(int64_t r) const { return {*this, data_ + r * pitch_, rows_ * pitch_}; } // there is room for a vector more
  void region(LookAhead&, int64_t, int64_t, int64_t) const {}

 private:
  // Of all images, each with its padding.
  int64_t padded_row(int64_t row) const { return row / down_ * padded_[0] + row % down_ * step_; }

  static void zero(T* out, int64_t count) {
    for (int64_t i = 0; i < count; i += kLanes<T>) store_vec(out + i, Vec<Opmath<T>>{}); // the next elements are written later
  }

  template <class Source>
  static void copy(const Source& source, T* out, int64_t at, int64_t pixels, int64_t channels) {
    if constexpr (Source::kPlain) {
      for (int64_t i = 0; i < pixels * channels; i += kLanes<T>) {
        store_vec(out + i, load_within(source, source.column(0), at + i));
      }
      return;
    }
    if (channels % kLanes<T> == 0) {
      for (int64_t j = 0; j < channels; j += kLanes<T>) {
        const auto column = source.column(j);
        for (int64_t w = 0; w < pixels; ++w) {
          store_vec(out + w * channels + j, source.load(column, at + w * channels + j, AllLanes{}));
        }
      }
      return;
    }
    for (int64_t w = 0; w < pixels; ++w, at += channels, out += channels) {
      for (int64_t j = 0; j < channels; j += kLanes<T>) {
        store_vec(out + j, load_within(source, source.column(j), at + j));
      }
    }
  }

  T* data_;
  int32_t* offsets_;
  int64_t first_, down_, step_, padded_[2], run_, pitch_, runs_, low_, rows_;
};

ALWAYS_INLINE void copy_vec(float* to, const float* from) { store_vec(to, load_vec(from)); }
ALWAYS_INLINE void copy_vec(BFloat16* to, const BFloat16* from) { store_raw(to, load_raw<HalfWords>(from)); }

// The patches of `rows` points, from step `first` of their depth on.
template <class T>
void pack_left_by_rows(const Band<T>& band, T* panel, int64_t row, int rows, int64_t first, int64_t depth) {
  for (int r = 0; r < rows; ++r) {
    const T* patch = band.data() + band.offset(row + r);
    T* out = panel + r * kRowPitch<T>;
    int64_t done = 0, run = first / band.run(), from = first % band.run();
    while (done < depth) {
      const int64_t rest = depth - done, length = band.run() - from < rest ? band.run() - from : rest;
      const T* at = patch + run * band.pitch() + from;
      for (int64_t j = 0; j < length; j += kLanes<T>) copy_vec(out + done + j, at + j);
      done += length;
      from = 0;
      ++run;
    }
    end_row(out, depth);
  }
}

// Filters as dgrad multiplies them: a row for each position of the mirrored filter and each of its channels.
template <class A>
struct MirroredFilters {
  using Stored = A;
  const A* data;
  int64_t channels, filter, first[2], step[2], taps[2], outputs, elements;

  explicit MirroredFilters(const ConvArgs& c)
      : data(static_cast<const A*>(c.weight)),
        channels(c.channels),
        filter(c.filter[1]),
        first{c.first_tap[0], c.first_tap[1]},
        step{c.tap_step[0], c.tap_step[1]},
        taps{c.taps[0], c.taps[1]},
        outputs(c.outputs),
        elements(c.channels * c.taps[0] * c.taps[1] * c.outputs) {}

  int64_t offset(int64_t row) const {
    const int64_t k = row % channels, at = row / channels;
    const int64_t r = first[0] - at / filter * step[0], s = first[1] - at % filter * step[1];
    return ((k * taps[0] + r) * taps[1] + s) * outputs;
  }
  char column(int64_t) const { return 0; }
  template <class Lanes>
  auto load(char, int64_t at, Lanes lanes) const {
    return lanes.load(data + at);
  }
  void prefetch(int64_t at) const { __builtin_prefetch(data + at); }
};
