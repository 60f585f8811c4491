// The weight's gradient of convolutions of narrow.h: sums of the taps of a row by a few channels, vectors of outputs, in
// registers. Included by convolutions.cpp only.
//
// An element of the image is broadcast once for the taps of a row that it meets, whose gradients are vectors: of 3 taps
// and eight channels 8 broadcasts and 3 loads for 24 FMAs; of a picture's 7 taps and stride 2 6 broadcasts and 7 loads
// for 21. A few rows of the grid at a time, so that what is read again is in the first-level cache.

// Pixels of zeros before and after a row of gradients.
constexpr int64_t margin_of(int64_t taps, int64_t stride) { return (taps - 1) / stride; }
inline int64_t margin_of(const ConvArgs& c) { return margin_of(c.filter[1], c.stride[1]); }

// sums[tap][channel] of `rows` rows of the grid, whose images begin at `image`, `channels` apart: `pixels` of a row with
// one margin; `gradients` begins a margin before the row's first.
template <class T, int group, int taps, int stride>
void narrow_weight_run(const T* image, int64_t channels, int64_t pitch, const T* gradients, int64_t gradient_pitch,
                       int64_t pixels, int64_t rows, T* sums, Ahead ahead) {
  constexpr int L = kLanes<T>, margin = margin_of(taps, stride);
  Vec<T> acc[taps][group] = {};
  for (int64_t row = 0; row < rows; ++row, image += stride * pitch, gradients += gradient_pitch) {
    const T *x = image, *dy = gradients;
    for (int64_t q = 0; q < pixels; ++q, x += stride * channels, dy += L) {
#pragma GCC unroll 2
      for (int phase = 0; phase < stride; ++phase) {
        Vec<T> of_tap[margin + 1];
#pragma GCC unroll 4
        for (int s = phase; s < taps; s += stride) of_tap[s / stride] = load_vec(dy + (margin - s / stride) * L);
#pragma GCC unroll 8
        for (int c = 0; c < group; ++c) {
          const Vec<T> value = broadcast(x[phase * channels + c]);
#pragma GCC unroll 4
          for (int s = phase; s < taps; s += stride) acc[s][c] = fma(value, of_tap[s / stride], acc[s][c]);
        }
      }
      __builtin_prefetch(ahead.at, 0, 2);
      ahead.at += ahead.step;
    }
  }
#pragma GCC unroll 24
  for (int i = 0; i < taps * group; ++i) store_vec(sums + i * L, load_vec(sums + i * L) + acc[i / group][i % group]);
}

// The run of a convolution, and how many channels it sums.
template <class T>
struct NarrowWeightRun {
  void (*run)(const T* image, int64_t channels, int64_t pitch, const T* gradients, int64_t gradient_pitch,
              int64_t pixels, int64_t rows, T* sums, Ahead ahead);
  int64_t group;

  static NarrowWeightRun of(const ConvArgs& c) {
    constexpr int kGroup = 8, kPicture = kPictureChannels;
    if (c.channels != kPicture) return {narrow_weight_run<T, kGroup, 3, 1>, kGroup};
    if (c.filter[1] == 7) return {narrow_weight_run<T, kPicture, 7, 2>, kPicture};
    if (c.stride[1] == 2) return {narrow_weight_run<T, kPicture, 3, 2>, kPicture};
    return {narrow_weight_run<T, kPicture, 3, 1>, kPicture};
  }
};

// Gradients of rows of the grid, with their margins, of one vector of outputs.
template <class T, class Source>
void fill_gradients(const ConvArgs& c, const Source& dy, Range rows, int64_t output, T* out) {
  constexpr int L = kLanes<T>;
  const int64_t margin = margin_of(c);
  const auto column = dy.column(output);
  for (int64_t row = rows.begin; row < rows.end; ++row, out += (c.out[1] + 2 * margin) * L) {
    const int64_t at = dy.offset(row * c.out[1]) + output;
    T* to = out + margin * L;
    for (int64_t i = 1; i <= margin; ++i) {
      store_vec(to - i * L, Vec<T>{});
      store_vec(to + (c.out[1] + i - 1) * L, Vec<T>{});
    }
    for (int64_t q = 0; q < c.out[1]; ++q) store_vec(to + q * L, load_within(dy, column, at + q * c.outputs));
  }
}

template <class T>
int64_t whole_vectors(int64_t channels) {
  return (channels + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
}

// Elements of a task's memory for bands of `c.band` points.
template <class A>
int64_t narrow_weight_elements(const ConvArgs& c) {
  const int64_t wide = whole_vectors<Opmath<A>>(c.outputs), rows = c.band / c.out[1];
  return wide * (c.filter[0] * c.filter[1] * c.channels + rows * (c.out[1] + 2 * margin_of(c)));
}

// The sums of rows [begin, end) of a band.
template <class A, class Source, class Dy>
void narrow_weight_band(const ConvArgs& c, const Band<Opmath<A>>& band, Range rows, const Source& source, const Dy& dy,
                        Opmath<A>* sums, Opmath<A>* gradients) {
  using T = Opmath<A>;
  constexpr int64_t L = kLanes<T>;
  const auto [run, group] = NarrowWeightRun<T>::of(c);
  const int64_t Q = c.out[1], margin = margin_of(c), pitch = (Q + 2 * margin) * L, count = rows.end - rows.begin;
  const int64_t step = Q < kChain ? kChain / Q : 1, read = c.stride[0] * c.in[1], runs = c.filter[0] * c.channels / group;
  for (int64_t k = 0; k < c.outputs; k += L) fill_gradients(c, dy, rows, k, gradients + k / L * count * pitch);
  LookAhead look(sums);
  source.region(look, rows.end * read, count * read, c.channels);
  dy.region(look, rows.end * Q, count * Q, c.outputs);
  look.share((count + step - 1) / step * runs * ((c.outputs + L - 1) / L) * (Q + margin) * step);
  for (int64_t row = rows.begin; row < rows.end; row += step) {
    const int64_t own = rows.end - row < step ? rows.end - row : step;
    T* to = sums;
    for (int64_t k = 0; k < c.outputs; k += L) {
      const T* from = gradients + (k / L * count + row - rows.begin) * pitch;
      for (int64_t r = 0; r < c.filter[0]; ++r) {
        for (int64_t first = 0; first < c.channels; first += group, to += c.filter[1] * group * L) {
          run(band.row(row) + r * band.pitch() + first, c.channels, band.pitch(), from, pitch, Q + margin, own, to,
              look.take((Q + margin) * own));
        }
      }
    }
  }
}

// (K, taps, C) from the sums of rows of taps, groups of channels, taps and channels; whether all of it is finite.
template <class T>
bool put_narrow_weight(const ConvArgs& c, const T* sums, T* result) {
  constexpr int64_t L = kLanes<T>;
  const int64_t C = c.channels, taps = c.filter[1], depth = c.filter[0] * taps * C, group = NarrowWeightRun<T>::of(c).group;
  T worst = 0; // what is not finite times zero is not zero
  for (int64_t k = 0; k < c.outputs; ++k) {
    const T* from = sums + k / L * depth * L + k % L;
    for (T* row = result + k * depth; row < result + (k + 1) * depth; row += taps * C) {
      for (int64_t first = 0; first < C; first += group) {
        for (int64_t s = 0; s < taps; ++s) {
          for (int64_t i = 0; i < group; ++i, from += L) {
            row[s * C + first + i] = *from;
            worst += *from * 0;
          }
        }
      }
    }
  }
  return worst == 0;
}

// (K, taps, C) of the task's rows of the grid, each image's in bands of its own. Unfinished where a sum is not finite: an
// element that no tap meets is multiplied by a margin's zero.
template <class A>
void narrow_wgrad(const ConvArgs& c, const ProjectionTask& task) {
  using T = Opmath<A>;
  constexpr int64_t L = kLanes<T>;
  const int64_t C = c.channels, elements = c.filter[0] * c.filter[1] * C * whole_vectors<T>(c.outputs);
  T* sums = static_cast<T*>(task.patches);
  for (int64_t i = 0; i < elements; i += L) store_vec(sums + i, Vec<T>{});
  with_source<A>(c.gradient, c.gradient_kind, c.batch * c.out[0] * c.out[1], c.outputs, [&](const auto& dy) {
    with_source<A>(c.image, c.kind, c.batch * c.in[0] * c.in[1], C, [&](const auto& source) {
      const int64_t most = c.band / c.out[1];
      for (int64_t image = task.rows[0] / c.out[0]; image * c.out[0] < task.rows[1]; ++image) {
        const int64_t first = image * c.out[0], last = first + c.out[0];
        const Blocks bands(first > task.rows[0] ? first : task.rows[0], last < task.rows[1] ? last : task.rows[1],
                           most, 1);
        for (int64_t row = bands.begin; row < bands.end; row = bands.stop(row)) {
          const Range rows{row, bands.stop(row)};
          Band<T> band(c, task, {rows.begin * c.out[1], rows.end * c.out[1]});
          band.fill(c, source);
          band.end_with_zeros(); // a stride of 2 reads a pixel past the last row
          narrow_weight_band<A>(c, band, rows, source, dy, sums, sums + elements);
        }
      }
    });
  });
  *task.unfinished = !put_narrow_weight(c, sums, static_cast<T*>(task.result));
}
