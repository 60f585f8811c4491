// Convolutions of few channels by filters of up to 3x3, of a panel's columns one vector or two, and of pictures of three
// channels, by 7x7 too: directly from a band, with the sums of a run of pixels and the vectors of outputs of a row of
// taps in registers. Included by convolutions.cpp only.
//
// An element of a band is broadcast once for all the pixels of a row that it is a neighbour of: with 3 taps and stride
// 1 18 broadcasts and 3 loads for 48 FMAs, where a packed panel of one vector takes 13 loads for 12, and neither patches
// nor products go through memory. A chain of sums is as long as the filter: 9 * channels at most.

constexpr int kNarrowSums = 16; // vectors of a run

// out[pixel][vector] of `pixels` pixels from `image` on, of `rows` rows of taps, whose rows are `pitch` apart. filters:
// (rows, channels, taps) times vectors.
template <class T, int channels, int vectors, int taps, int stride, int pixels>
void narrow_run(const T* image, int64_t pitch, int64_t rows, const T* filters, T* out, Ahead ahead) {
  constexpr int L = kLanes<T>;
  Vec<T> sums[pixels][vectors] = {};
  for (int64_t r = 0; r < rows; ++r, image += pitch) {
    for (int c = 0; c < channels; ++c, filters += taps * vectors * L) {
      Vec<T> own[taps][vectors];
#pragma GCC unroll 14
      for (int i = 0; i < taps * vectors; ++i) own[i / vectors][i % vectors] = load_vec(filters + i * L);
#pragma GCC unroll 37
      for (int p = 0; p < stride * (pixels - 1) + taps; ++p) {
        const Vec<T> value = broadcast(image[p * channels + c]);
#pragma GCC unroll 7
        for (int s = 0; s < taps; ++s) {
          if (p < s || (p - s) % stride != 0 || (p - s) / stride >= pixels) continue;
          Vec<T>* sum = sums[(p - s) / stride];
#pragma GCC unroll 2
          for (int v = 0; v < vectors; ++v) sum[v] = fma(value, own[s][v], sum[v]);
        }
      }
      __builtin_prefetch(ahead.at, 0, 2);
      ahead.at += ahead.step;
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < pixels * vectors; ++i) store_vec(out + i * L, sums[i / vectors][i % vectors]);
}

template <class T>
using NarrowRun = void (*)(const T* image, int64_t pitch, int64_t rows, const T* filters, T* out, Ahead ahead);

// The run of `pixels` or a few more.
template <class T, int channels, int vectors, int taps, int stride>
NarrowRun<T> narrow_run_of(int pixels) {
  if (pixels <= 4) return narrow_run<T, channels, vectors, taps, stride, 4>;
  if (vectors == 2 || pixels <= 8) return narrow_run<T, channels, vectors, taps, stride, 8>;
  return narrow_run<T, channels, vectors, taps, stride, kNarrowSums / vectors>;
}

template <class T, int channels, int vectors>
NarrowRun<T> narrow_run_of(const ConvArgs& c, int pixels) {
  if (c.stride[1] == 2) return narrow_run_of<T, channels, vectors, 3, 2>(pixels);
  if (c.filter[1] == 1) return narrow_run_of<T, channels, vectors, 1, 1>(pixels);
  if (c.filter[1] == 2) return narrow_run_of<T, channels, vectors, 2, 1>(pixels);
  return narrow_run_of<T, channels, vectors, 3, 1>(pixels);
}

// Of pictures.
template <class T, int vectors>
NarrowRun<T> narrow_stem_of(const ConvArgs& c, int pixels) {
  if (c.filter[1] == 7) return narrow_run_of<T, kPictureChannels, vectors, 7, 2>(pixels);
  if (c.stride[1] == 2) return narrow_run_of<T, kPictureChannels, vectors, 3, 2>(pixels);
  return narrow_run_of<T, kPictureChannels, vectors, 3, 1>(pixels);
}

template <class T, int vectors>
NarrowRun<T> narrow_run_of(const ConvArgs& c, int pixels) {
  if (c.channels == kPictureChannels) return narrow_stem_of<T, vectors>(c, pixels);
  if (c.channels == 16) return narrow_run_of<T, 16, vectors>(c, pixels);
  if (c.channels == 32) return narrow_run_of<T, 32, vectors>(c, pixels);
  return narrow_run_of<T, 64, vectors>(c, pixels);
}

// The filters of the outputs from `first` on as narrow_run takes them.
template <class A>
void pack_narrow(const ConvArgs& c, int64_t first, int64_t vectors, Opmath<A>* out) {
  const auto* weight = static_cast<const A*>(c.weight);
  const MirroredFilters<A> mirrored(c);
  const int64_t C = c.channels, taps = c.filter[1], depth = c.filter[0] * taps * C, wide = vectors * kLanes<A>;
  for (int64_t row = 0; row < depth; ++row) {
    const int64_t tap = row / C, channel = row % C;
    Opmath<A>* to = out + ((tap / taps * C + channel) * taps + tap % taps) * wide;
    for (int64_t k = 0; k < wide; ++k) {
      const int64_t output = first + k, at = c.is_mirrored ? mirrored.offset(row) + output : output * depth + row;
      to[k] = output < c.outputs ? SomeLanes{1}.load(weight + at)[0] : 0;
    }
  }
}

template <class A, int vectors, class Store>
void narrow_as(const ConvArgs& c, const ProjectionTask& task, Store& store) {
  using T = Opmath<A>;
  constexpr int64_t W = vectors * kLanes<T>;
  const int64_t Q = c.out[1], runs = c.filter[0] * c.channels, block = runs * c.filter[1] * W;
  T* tile = static_cast<T*>(task.workspace);
  T* filters = tile + kNarrowSums * kLanes<T>;
  const int64_t blocks = (c.outputs + W - 1) / W;
  for (int64_t b = 0; b < blocks; ++b) pack_narrow<A>(c, b * W, vectors, filters + b * block);
  const Panels cut(0, Q, kNarrowSums / vectors);
  const NarrowRun<T> run = narrow_run_of<T, vectors>(c, static_cast<int>((Q + cut.count - 1) / cut.count));
  with_source<A>(c.image, c.kind, c.batch * c.in[0] * c.in[1], c.channels, [&](const auto& source) {
    const Blocks bands(task.rows[0] / Q, task.rows[1] / Q, c.band / Q, 1);
    for (int64_t first = bands.begin; first < bands.end; first = bands.stop(first)) {
      Band<T> band(c, task, {first * Q, bands.stop(first) * Q});
      band.fill(c, source);
      for (int64_t row = first; row < bands.stop(first); ++row) {
        const T* image = band.row(row);
        LookAhead look(filters);
        const int64_t read = c.stride[0] * c.in[1];
        source.region(look, (row + bands.size) * read, read, c.channels);
        store.ahead(look, row * Q, static_cast<int>(Q), 0, c.outputs);
        look.share(cut.count * blocks * runs);
        for (int64_t p = 0; p < cut.count; ++p) {
          const int64_t q = cut.start(p);
          for (int64_t b = 0; b < blocks; ++b) {
            run(image + q * c.stride[1] * c.channels, band.pitch(), c.filter[0], filters + b * block, tile,
                look.take(runs));
            const int64_t columns = c.outputs - b * W < W ? c.outputs - b * W : W;
            store.finish(tile, W, row * Q + q, cut.rows(p), b * W, columns);
          }
        }
      }
    }
  });
  fence_streams();
}

// The task's rows are whole rows of the grid.
template <class A, class Store>
void narrow(const ConvArgs& c, const ProjectionTask& task, Store& store) {
  c.outputs <= kLanes<A> ? narrow_as<A, 1>(c, task, store) : narrow_as<A, 2>(c, task, store);
}

template <class A>
void narrow_fwd(const ConvArgs& c, const ProjectionTask& task) {
  with_forward_store<A>(c, task, [&](auto& store) { narrow<A>(c, task, store); });
}

template <class A>
void narrow_dgrad(const ConvArgs& c, const ProjectionTask& task) {
  GradientStore<A> store(c, task.sums);
  narrow<A>(c, task, store);
}
