// The inner product of small matrices that all matrix products here are made of. Included by kernels.cpp only.
//
// A register tile is up to kPanelVectors vectors of columns of the right matrix times as many rows of the left one as the
// registers hold: on AVX-512 6 x 64 floats, or 12 x 32 and 12 x 16 where fewer columns are wanted. One step of the depth
// loads the vectors of the right panel and broadcasts each row's element of the left one: 10 loads for 24 FMAs. In cache
// that is 173 of 175 GFLOP/s on an Ice Lake Xeon at 2.8 GHz, where 14 x 32, 16 loads for 28 FMAs, makes 160, and 115 to
// 125 while the core's other thread is at work.
//
// Layouts of packed panels, d being the step of the depth:
//   right        element (d, column) at d * kPanelColumns + column
//   left, rows   element (row, d) at row * kRowPitch + d: a constant pitch, so that one pointer serves all rows
//   left, short rows   the same where no row is longer than kMostShort, with a pitch that spares pages
//   left, depth  element (row, d) at d * kDepthPitch + row

// Rows of a panel, and of a register tile of more than two vectors.
#if defined(__AMX_BF16__)
constexpr int kPanelRows = 15, kWideRows = 15, kPanelVectors = 4; // of one tile, see gemm_amx.h
#elif defined(__AVX512F__) || defined(__aarch64__)
constexpr int kPanelRows = 12, kWideRows = 6, kPanelVectors = 4; // of 32 vector registers
#else
constexpr int kPanelRows = 6, kWideRows = 6, kPanelVectors = 2; // of 16
#endif
template <class T>
constexpr int kPanelColumns = kPanelVectors * kLanes<T>;

// The deepest panel. A left panel by rows then fits the first-level cache; one line more than a power of two, so
// that its rows do not share cache sets.
template <class T>
constexpr int64_t kMostDepth = 2048 / sizeof(T);
template <class T>
constexpr int64_t kRowPitch = kMostDepth<T> + 64 / sizeof(T);
// Whole vectors of any type, and a divisor of the rows that packed_weight.h gives to a task.
template <class T>
constexpr int64_t kDepthPitch = kPanelRows > 8 ? 16 : 8;
static_assert(kPanelRows <= 16 && kDepthPitch<float> % kLanes<float> == 0);

template <class T>
constexpr int64_t kMostShort = 256 / sizeof(T);
template <class T>
constexpr int64_t kShortPitch = kMostShort<T> + 64 / sizeof(T);

// What a stored type is multiplied as, and so the type of panels. bfloat16 is float but where instructions multiply it
// themselves: then a pair of steps is one element of 32 bits in either panel, the right one's of columns side by side,
// and the depth is padded with zeros to whole steps of AMX.
template <class A>
struct PanelOf {
  using type = Opmath<A>;
};
#if defined(__AVX512BF16__)
template <>
struct PanelOf<BFloat16> {
  using type = BFloat16;
};
#endif
template <class A>
using Panel = typename PanelOf<A>::type;
template <class T>
constexpr int kPair = sizeof(T) == 2 ? 2 : 1; // steps that are multiplied at once
template <class T>
constexpr int64_t kDepthStep = sizeof(T) == 2 ? 32 : 1;
template <class T>
int64_t whole_steps(int64_t depth) {
  return (depth + kDepthStep<T> - 1) / kDepthStep<T> * kDepthStep<T>;
}

enum LeftLayout : int { kByRows, kByShortRows, kByDepth };

// Elements from a row to the next, and from a step of the depth to the next.
template <class T, LeftLayout layout>
constexpr int64_t kAcross = layout == kByRows ? kRowPitch<T> : layout == kByShortRows ? kShortPitch<T> : 1;
template <class T, LeftLayout layout>
constexpr int64_t kAlong = layout == kByDepth ? kDepthPitch<T> : 1;

// What to ask of memory while a tile is computed: `step` bytes further with each step of the depth.
struct Ahead {
  const char* at = nullptr;
  int64_t step = 0;
};

struct Region {
  const char* at = nullptr;
  int64_t bytes = 0;
};

// out = left * right, or out += left * right; rows of out are `pitch` apart.
template <class T>
using MicroKernel = void (*)(int64_t depth, const T* left, const T* right, Opmath<T>* out, int64_t pitch, bool add,
                             Ahead ahead);

// The next step's elements of a vector of columns and of a row, and what their product adds to a sum.
template <class T>
ALWAYS_INLINE Vec<T> load_step(const T* columns) {
  return load_vec(columns);
}
template <class T>
ALWAYS_INLINE Vec<T> broadcast_step(const T* row) {
  return broadcast(*row);
}
template <class V>
ALWAYS_INLINE V multiply_step(V row, V columns, V sum) {
  return fma(row, columns, sum);
}
#if defined(__AVX512BF16__)
ALWAYS_INLINE __m512bh load_step(const BFloat16* columns) { return load_raw<__m512bh>(columns); }
ALWAYS_INLINE __m512bh broadcast_step(const BFloat16* row) {
  return (__m512bh)_mm512_set1_epi32(load_raw<int32_t>(row));
}
ALWAYS_INLINE Floats multiply_step(__m512bh row, __m512bh columns, Floats sum) {
  return _mm512_dpbf16_ps(sum, row, columns);
}
#endif

template <class T, LeftLayout layout, int vectors, int rows>
void micro_kernel(int64_t depth, const T* left, const T* right, Opmath<T>* out, int64_t pitch, bool add,
                  Ahead ahead) {
  constexpr int64_t across = kAcross<T, layout>, along = kAlong<T, layout> * kPair<T>;
  Vec<Opmath<T>> acc[rows][vectors] = {};
  for (int r = 0; add && r < rows; ++r) {
    for (int v = 0; v < vectors; ++v) __builtin_prefetch(out + r * pitch + v * kLanes<T>, 1);
  }
#pragma GCC unroll 2
  for (int64_t d = 0; d < depth; d += kPair<T>) {
    decltype(load_step(right)) columns[vectors];
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) columns[v] = load_step(right + v * kLanes<T> * kPair<T>);
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) {
      const auto value = broadcast_step(left + r * across);
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) acc[r][v] = multiply_step(value, columns[v], acc[r][v]);
    }
    __builtin_prefetch(ahead.at, 0, 2);
    ahead.at += ahead.step;
    left += along;
    right += kPanelColumns<T> * kPair<T>;
  }
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      Opmath<T>* to = out + r * pitch + v * kLanes<T>;
      store_vec(to, add ? load_vec(to) + acc[r][v] : acc[r][v]);
    }
  }
}

template <int... i>
struct Indices {};
template <int n, int... i>
struct IndicesUpTo {
  using type = typename IndicesUpTo<n - 1, n - 1, i...>::type;
};
template <int... i>
struct IndicesUpTo<0, i...> {
  using type = Indices<i...>;
};
template <int n>
using MakeIndices = typename IndicesUpTo<n>::type; // 0 to n - 1

// micro_kernel of every number of rows, from 1 on.
template <class T, LeftLayout layout, int vectors, class = MakeIndices<(vectors > 2 ? kWideRows : kPanelRows)>>
struct MicroKernels;
template <class T, LeftLayout layout, int vectors, int... i>
struct MicroKernels<T, layout, vectors, Indices<i...>> {
  static constexpr int kMostRows = sizeof...(i);
  static constexpr MicroKernel<T> of[] = {nullptr, micro_kernel<T, layout, vectors, i + 1>...};
};

// Steps of the depth that are summed one after another in a register: an element is the sum of such chains, so that
// its rounding error grows with their length and their number, not with the depth. A chain more costs a load and a
// store of the tile, which is in the first-level cache.
constexpr int64_t kChain = 128;

// The micro-kernel over the whole of a panel's depth in equal chains, and over its rows in equal parts, which follow one
// another in a chain: the right panel's part of it is then in the first-level cache.
template <class T, LeftLayout layout, int vectors>
void multiply_tile_by(int rows, int64_t depth, const T* left, const T* right, Opmath<T>* out, int64_t pitch, bool add,
                      Ahead ahead) {
  using Kernels = MicroKernels<T, layout, vectors>;
  constexpr int64_t across = kAcross<T, layout>, along = kAlong<T, layout>;
  constexpr int64_t longest = layout == kByDepth ? kChain : 2 * kChain; // 2 to 4 % of a product of rows, none of columns
  const int64_t chains = depth > longest ? (depth + longest - 1) / longest : 1;
  const int upper = rows > Kernels::kMostRows ? (rows + 1) / 2 : rows, lower = rows - upper;
  static_assert(2 * Kernels::kMostRows >= kPanelRows);
  for (int64_t chain = 0; chain < chains; ++chain) {
    const int64_t d = depth * chain / chains / kPair<T> * kPair<T>;
    const int64_t steps = depth * (chain + 1) / chains / kPair<T> * kPair<T> - d;
    const T* from = left + d * along;
    const T* panel = right + d * kPanelColumns<T>;
    const bool sums = add || chain > 0;
    Kernels::of[upper](steps, from, panel, out, pitch, sums, ahead);
    ahead.at += steps / kPair<T> * ahead.step;
    if (lower == 0) continue;
    Kernels::of[lower](steps, from + upper * across, panel, out + upper * pitch, pitch, sums, ahead);
    ahead.at += steps / kPair<T> * ahead.step;
  }
}

// Steps of the micro-kernel in which a tile asks memory for something ahead.
template <class T>
int64_t calls_of_tile(int rows, int64_t columns, int64_t depth) {
  return depth / kPair<T> * (columns > 2 * kLanes<T> && rows > kWideRows ? 2 : 1);
}

#if defined(__AMX_BF16__)
void multiply_by_amx(int rows, int64_t vectors, int64_t depth, const BFloat16* left, const BFloat16* right, float* out,
                     int64_t pitch, bool add, Ahead ahead);
#endif

// For the first `columns` of its columns.
template <class T, LeftLayout layout>
void multiply_tile(int rows, int64_t columns, int64_t depth, const T* left, const T* right, Opmath<T>* out,
                   int64_t pitch, bool add, Ahead ahead) {
  const int64_t vectors = (columns + kLanes<T> - 1) / kLanes<T>;
#if defined(__AMX_BF16__)
  if constexpr (kPair<T> == 2) return multiply_by_amx(rows, vectors, depth, left, right, out, pitch, add, ahead);
#endif
  if (vectors == 1) return multiply_tile_by<T, layout, 1>(rows, depth, left, right, out, pitch, add, ahead);
  if (vectors == 2 || kPanelVectors == 2) {
    return multiply_tile_by<T, layout, 2>(rows, depth, left, right, out, pitch, add, ahead);
  }
  if constexpr (kPanelVectors > 2) {
    if (vectors == 3) return multiply_tile_by<T, layout, 3>(rows, depth, left, right, out, pitch, add, ahead);
    multiply_tile_by<T, layout, 4>(rows, depth, left, right, out, pitch, add, ahead);
  }
}

// Cuts [begin, end) into panels as even as can be.
struct Panels {
  int64_t begin, length, count;

  Panels(int64_t first, int64_t end, int64_t most)
      : begin(first), length(end - first), count((length + most - 1) / most) {}
  int64_t start(int64_t panel) const { return begin + length * panel / count; }
  int rows(int64_t panel) const { return static_cast<int>(start(panel + 1) - start(panel)); }
};
