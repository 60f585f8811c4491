// Packing: from tensors to the panels of gemm_micro.h. Included by kernels.cpp only.
//
// A Source is a matrix as its packer sees it, prologue included:
//   elements              of its tensors, so that a whole vector may be read where it stays inside them
//   offset(row)           of the row's first element
//   column(j)             the constants of a vector of columns, loaded once for several rows
//   load(column, at, n)   the vector of opmath at offset `at`, from lanes n
//   prefetch(at)          asks memory for what such a load reads
// What a panel holds beyond its rows and columns is never looked at: the other elements of a vector are left in it.

// A matrix in memory, converted.
template <class A>
struct PlainRows {
  using Stored = A;
  const A* data;
  int64_t pitch, elements;

  int64_t offset(int64_t row) const { return row * pitch; }
  char column(int64_t) const { return 0; }
  template <class Lanes>
  auto load(char, int64_t at, Lanes lanes) const {
    return lanes.load(data + at);
  }
  void prefetch(int64_t at) const { __builtin_prefetch(data + at); }
};

// The vector at offset `at`, whole where the tensor has it.
template <class Source, class Column>
ALWAYS_INLINE auto load_within(const Source& source, const Column& column, int64_t at) {
  constexpr int L = kLanes<typename Source::Stored>;
  if (__builtin_expect(at + L <= source.elements, 1)) return source.load(column, at, AllLanes{});
  const int64_t left = source.elements - at;
  return source.load(column, at, SomeLanes{left > 0 ? left : 0});
}

// Zeros up to whole steps of a row of a left panel.
template <class T>
ALWAYS_INLINE void end_row(T* row, int64_t depth) {
  for (int64_t d = depth; kDepthStep<T> > 1 && d < whole_steps<T>(depth); ++d) row[d] = T{};
}

template <class Source, class T>
void pack_left_by_rows(const Source& source, T* panel, int64_t row, int rows, int64_t first, int64_t depth) {
  int64_t offsets[kPanelRows];
  for (int r = 0; r < rows; ++r) offsets[r] = source.offset(row + r) + first;
  for (int64_t j = 0; j < depth; j += kLanes<T>) {
    const auto column = source.column(first + j);
    for (int r = 0; r < rows; ++r) store_vec(panel + r * kRowPitch<T> + j, load_within(source, column, offsets[r] + j));
  }
  for (int r = 0; r < rows; ++r) end_row(panel + r * kRowPitch<T>, depth);
}

// Rows of a source that are packed at once: their loads run side by side, and constants serve all of them.
constexpr int kRowsAtOnce = 8;

// One vector of columns of `rows` rows, at most kRowsAtOnce; asks for the same columns of the rows `next` meanwhile.
template <class Source, class T>
ALWAYS_INLINE void pack_column(const Source& source, T* panel, int64_t j, const int64_t* offsets, const int64_t* next,
                               int rows) {
  const auto column = source.column(j);
  for (int r = 0; r < rows; ++r) {
    store_vec(panel + r * kDepthPitch<T>, load_within(source, column, offsets[r] + j));
    source.prefetch(next[r] + j);
  }
}

// Elements of a left panel whose depth is rows of a source.
template <class T>
constexpr LeftLayout kLeftByDepth = kPair<T> == 1 ? kByDepth : kByRows;
template <class T>
int64_t left_panel(int64_t depth) {
  return kPair<T> == 1 ? depth * kDepthPitch<T> : kPanelRows * kRowPitch<T>;
}

// Columns of the source, cut into panels, transposed: its rows [row, row + depth) are the steps.
// sums, if not null: of each column over these rows, added in double.
template <class Source, class T>
void pack_left_by_depth(const Source& source, T* block, const Panels& panels, int64_t row, int64_t depth,
                        double* sums) {
  int64_t offsets[2 * kRowsAtOnce];
  for (int64_t d = 0; d < depth; d += kRowsAtOnce) {
    const int rows = static_cast<int>(depth - d < kRowsAtOnce ? depth - d : kRowsAtOnce);
    for (int r = 0; r < 2 * kRowsAtOnce; ++r) offsets[r] = source.offset(row + (d + r < depth ? d + r : depth - 1));
    for (int64_t p = 0; p < panels.count; ++p) {
      T* panel = block + (p * depth + d) * kDepthPitch<T>;
      const int64_t begin = panels.start(p), end = begin + panels.rows(p);
      for (int64_t j = begin; j < end; j += kLanes<T>, panel += kLanes<T>) {
        if (rows == kRowsAtOnce) {
          pack_column(source, panel, j, offsets, offsets + kRowsAtOnce, kRowsAtOnce);
        } else {
          pack_column(source, panel, j, offsets, offsets, rows);
        }
        if (sums == nullptr) continue;
        const SomeLanes lanes{end - j < kLanes<T> ? end - j : kLanes<T>};
        for (int r = 0; r < rows; ++r) accumulate(sums + j, load_vec(panel + r * kDepthPitch<T>), lanes);
      }
    }
  }
}

// Columns [begin, end) of the source: its rows are the steps.
template <class Source, class T>
void pack_right_by_depth(const Source& source, T* block, int64_t begin, int64_t end, int64_t row, int64_t depth) {
  for (int64_t d = 0; d < depth; ++d) {
    const int64_t at = source.offset(row + d);
    const int64_t next = source.offset(row + (d + kRowsAtOnce < depth ? d + kRowsAtOnce : depth - 1));
    T* panel = block + d * kPanelColumns<T>;
    for (int64_t j = begin; j < end; j += kPanelColumns<T>, panel += depth * kPanelColumns<T>) {
      for (int v = 0; v < kPanelVectors && j + v * kLanes<T> < end; ++v) {
        const int64_t column = j + v * kLanes<T>;
        store_vec(panel + v * kLanes<T>, load_within(source, source.column(column), at + column));
        source.prefetch(next + column);
      }
    }
  }
}

// Lanes of a and b in turns, from lane `first` of each.
template <class T, int first, int... i>
ALWAYS_INLINE Vec<T> interleave(Vec<T> a, Vec<T> b, Indices<i...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, (first + i / 2 + i % 2 * kLanes<T>)...);
#else
  return __builtin_shuffle(a, b, Vec<Integer<T>>{(first + i / 2 + i % 2 * kLanes<T>)...});
#endif
}

// Rows become columns: each round interleaves row i with row i + half, to rows 2 i and 2 i + 1.
template <class T>
ALWAYS_INLINE void transpose(Vec<T>* rows) {
  constexpr int half = kLanes<T> / 2;
  using All = MakeIndices<kLanes<T>>;
#pragma GCC unroll 4
  for (int done = 1; done < kLanes<T>; done *= 2) {
    Vec<T> mixed[kLanes<T>];
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i) {
      mixed[2 * i] = interleave<T, 0>(rows[i], rows[i + half], All{});
      mixed[2 * i + 1] = interleave<T, half>(rows[i], rows[i + half], All{});
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes<T>; ++i) rows[i] = mixed[i];
  }
}

// Rows [begin, end) of the source, transposed: its columns [first, first + depth) are the steps.
template <class Source, class T>
void pack_right_by_rows(const Source& source, T* block, int64_t begin, int64_t end, int64_t first, int64_t depth) {
  constexpr int L = kLanes<T>;
  for (int64_t j = begin; j < end; j += L) {
    T* panel = block + (j - begin) / kPanelColumns<T> * depth * kPanelColumns<T> + (j - begin) % kPanelColumns<T>;
    for (int64_t d = 0; d < depth; d += L) {
      Vec<T> square[L] = {};
      const auto column = source.column(first + d);
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) {
        if (j + i < end) square[i] = load_within(source, column, source.offset(j + i) + first + d);
      }
      transpose<T>(square);
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) {
        if (d + i < depth) store_vec(panel + (d + i) * kPanelColumns<T>, square[i]);
      }
    }
  }
}
