// Packing of bfloat16 for the instructions that multiply pairs of it, see gemm_micro.h: two steps of the depth are one
// element. These are more special than gemm_pack.h's and taken in their place. Included by convolutions.cpp only.

#if defined(__AVX512BF16__)

// Two vectors of columns as pairs, and one of 32 steps of a row.
ALWAYS_INLINE Floats pairs(Floats first, Floats second) {
  const Words low = widen_halfwords(encode(BFloat16{}, first)), high = widen_halfwords(encode(BFloat16{}, second));
  return bit_cast<Floats>(low | (high << 16));
}
template <class Source>
Floats row_of_pairs(const Source& source, int64_t at, int64_t step, int64_t count) {
  constexpr int L = kLanes<BFloat16>;
  BFloat16 steps[2 * L] = {};
  for (int half = 0; half < 2 && half * L < count; ++half) {
    const SomeLanes lanes{count - half * L < L ? count - half * L : L};
    lanes.store(steps + half * L, source.load(source.column(step + half * L), at + half * L, lanes));
  }
  return load_raw<Floats>(steps);
}

// A vector of columns of the rows `row` and the next one, of which those before `end` exist.
template <class Source>
ALWAYS_INLINE Floats pair_of_rows(const Source& source, int64_t row, int64_t end, int64_t j) {
  const auto column = source.column(j);
  const auto load = [&](int64_t r) {
    return r < end ? load_within(source, column, source.offset(r) + j) : Floats{};
  };
  return pairs(load(row), load(row + 1));
}

// Columns of the source, cut into panels, transposed: its rows [row, row + depth) are the steps.
template <class Source>
void pack_left_by_depth(const Source& source, BFloat16* block, const Panels& panels, int64_t row, int64_t depth,
                        double*) {
  constexpr int L = kLanes<BFloat16>;
  static_assert(kPanelRows <= L);
  for (int64_t p = 0; p < panels.count; ++p) {
    BFloat16* panel = block + p * left_panel<BFloat16>(depth);
    for (int64_t d = 0; d < whole_steps<BFloat16>(depth); d += 2 * L) {
      Floats square[L];
      for (int i = 0; i < L; ++i) square[i] = pair_of_rows(source, row + d + 2 * i, row + depth, panels.start(p));
      transpose<float>(square);
      for (int i = 0; i < panels.rows(p); ++i) store_raw(panel + i * kRowPitch<BFloat16> + d, square[i]);
    }
  }
}

// Columns [begin, end) of the source: its rows are the steps.
template <class Source>
void pack_right_by_depth(const Source& source, BFloat16* block, int64_t begin, int64_t end, int64_t row,
                         int64_t depth) {
  constexpr int64_t L = kLanes<BFloat16>, W = kPanelColumns<BFloat16>;
  const int64_t whole = whole_steps<BFloat16>(depth);
  for (int64_t d = 0; d < whole; d += 2) {
    for (int64_t j = begin; j < end; j += L) {
      BFloat16* panel = block + (j - begin) / W * whole * W + d * W + (j - begin) % W * 2;
      store_raw(panel, pair_of_rows(source, row + d, row + depth, j));
    }
  }
}

// Rows [begin, end) of the source, transposed: its columns [first, first + depth) are the steps.
template <class Source>
void pack_right_by_rows(const Source& source, BFloat16* block, int64_t begin, int64_t end, int64_t first,
                        int64_t depth) {
  constexpr int64_t L = kLanes<BFloat16>, W = kPanelColumns<BFloat16>;
  const int64_t whole = whole_steps<BFloat16>(depth);
  for (int64_t j = begin; j < end; j += L) {
    BFloat16* panel = block + (j - begin) / W * whole * W + (j - begin) % W * 2;
    for (int64_t d = 0; d < whole; d += 2 * L) {
      Floats square[L] = {};
      for (int64_t i = 0; i < L && j + i < end; ++i) {
        square[i] = row_of_pairs(source, source.offset(j + i) + first + d, first + d, depth - d);
      }
      transpose<float>(square);
      for (int64_t i = 0; i < L; ++i) store_raw(panel + (d + 2 * i) * W, square[i]);
    }
  }
}

#endif
