// The weight's gradient of the 3x3 convolutions of stride 1 of narrow.h: sums of three taps by eight channels, vectors of
// outputs, in registers. Included by convolutions.cpp only.
//
// An element of the image is broadcast once for the three taps of a row, whose gradients are three vectors: 8 broadcasts
// and 3 loads for 24 FMAs. A few rows of the grid at a time, so that what is read again is in the first-level cache.

constexpr int64_t kNarrowChannels = 8; // of a run
constexpr int64_t kNarrowMargin = 2;   // pixels of zeros before and after a row of gradients

// sums[tap][channel] of `rows` rows of the image from `image` on: `pixels` with their margin, `channels` apart; `gradients`
// begins a margin before the row's first.
template <class T>
void narrow_weight_run(const T* image, int64_t channels, int64_t pitch, const T* gradients, int64_t gradient_pitch,
                       int64_t pixels, int64_t rows, T* sums, Ahead ahead) {
  constexpr int L = kLanes<T>, C = kNarrowChannels;
  Vec<T> acc[3][C] = {};
  for (int64_t row = 0; row < rows; ++row, image += pitch, gradients += gradient_pitch) {
    const T *x = image, *dy = gradients;
    for (int64_t q = 0; q < pixels; ++q, x += channels, dy += L) {
      Vec<T> of_tap[3];
#pragma GCC unroll 3
      for (int s = 0; s < 3; ++s) of_tap[s] = load_vec(dy + (kNarrowMargin - s) * L);
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) {
        const Vec<T> value = broadcast(x[c]);
#pragma GCC unroll 3
        for (int s = 0; s < 3; ++s) acc[s][c] = fma(value, of_tap[s], acc[s][c]);
      }
      __builtin_prefetch(ahead.at, 0, 2);
      ahead.at += ahead.step;
    }
  }
#pragma GCC unroll 24
  for (int i = 0; i < 3 * C; ++i) store_vec(sums + i * L, load_vec(sums + i * L) + acc[i / C][i % C]);
}

// Gradients of rows of the grid, with their margins, of one vector of outputs.
template <class T, class Source>
void fill_gradients(const ConvArgs& c, const Source& dy, Range rows, int64_t output, T* out) {
  constexpr int L = kLanes<T>;
  const auto column = dy.column(output);
  for (int64_t row = rows.begin; row < rows.end; ++row, out += (c.out[1] + 2 * kNarrowMargin) * L) {
    const int64_t at = dy.offset(row * c.out[1]) + output;
    T* to = out + kNarrowMargin * L;
    for (int64_t i = 1; i <= kNarrowMargin; ++i) {
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
  return wide * (9 * c.channels + rows * (c.out[1] + 2 * kNarrowMargin));
}

// The sums of rows [begin, end) of a band.
template <class A, class Source, class Dy>
void narrow_weight_band(const ConvArgs& c, const Band<Opmath<A>>& band, Range rows, const Source& source, const Dy& dy,
                        Opmath<A>* sums, Opmath<A>* gradients) {
  using T = Opmath<A>;
  constexpr int64_t L = kLanes<T>;
  const int64_t Q = c.out[1], pitch = (Q + 2 * kNarrowMargin) * L, count = rows.end - rows.begin;
  const int64_t step = Q < kChain ? kChain / Q : 1, groups = c.channels / kNarrowChannels;
  for (int64_t k = 0; k < c.outputs; k += L) fill_gradients(c, dy, rows, k, gradients + k / L * count * pitch);
  LookAhead look(sums);
  source.region(look, rows.end * c.in[1], count * c.in[1], c.channels);
  dy.region(look, rows.end * Q, count * Q, c.outputs);
  look.share((count + step - 1) / step * 3 * groups * ((c.outputs + L - 1) / L) * (Q + 2) * step);
  for (int64_t row = rows.begin; row < rows.end; row += step) {
    const int64_t own = rows.end - row < step ? rows.end - row : step;
    T* to = sums;
    for (int64_t k = 0; k < c.outputs; k += L) {
      const T* from = gradients + (k / L * count + row - rows.begin) * pitch;
      for (int64_t r = 0; r < 3; ++r) {
        for (int64_t g = 0; g < groups; ++g, to += 3 * kNarrowChannels * L) {
          narrow_weight_run<T>(band.row(row) + r * band.pitch() + g * kNarrowChannels, c.channels, band.pitch(), from,
                               pitch, Q + 2, own, to, look.take((Q + 2) * own));
        }
      }
    }
  }
}

// (K, 9, C) of the task's rows of the grid, each image's in bands of its own.
template <class A>
void narrow_wgrad(const ConvArgs& c, const ProjectionTask& task) {
  using T = Opmath<A>;
  constexpr int64_t L = kLanes<T>;
  const int64_t C = c.channels, groups = C / kNarrowChannels, wide = whole_vectors<T>(c.outputs);
  T* sums = static_cast<T*>(task.patches);
  for (int64_t i = 0; i < 9 * C * wide; i += L) store_vec(sums + i, Vec<T>{});
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
          narrow_weight_band<A>(c, band, rows, source, dy, sums, sums + 9 * C * wide);
        }
      }
    });
  });
  auto* result = static_cast<T*>(task.result);
  for (int64_t k = 0; k < c.outputs; ++k) {
    for (int64_t i = 0; i < 9 * C; ++i) { // of rows of taps, groups, taps and channels
      const int64_t at = i % kNarrowChannels, s = i / kNarrowChannels % 3, g = i / kNarrowChannels / 3 % groups;
      const int64_t r = i / kNarrowChannels / 3 / groups;
      result[k * 9 * C + (r * 3 + s) * C + g * kNarrowChannels + at] = sums[(k / L * 9 * C + i) * L + k % L];
    }
  }
}
