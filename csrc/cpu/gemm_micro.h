// The inner product of small matrices that all matrix products here are made of. Included by kernels.cpp only.
//
// A register tile is kPanelRows rows of the left matrix times kPanelColumns<T> columns of the right one: on AVX-512
// 14 x 32 floats, 28 accumulators of 32 registers. One step of the depth loads two vectors of the right panel,
// broadcasts each row's element of the left one and does 28 FMAs: 16 loads for them, so FMAs are the limit.
//
// Layouts of packed panels, d being the step of the depth:
//   right        element (d, column) at d * kPanelColumns + column, columns padded with zeros
//   left, rows   element (row, d) at row * kRowPitch + d: a constant pitch, so that one pointer serves all rows
//   left, depth  element (row, d) at d * kDepthPitch + row

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kPanelRows = 14; // of 32 vector registers
#else
constexpr int kPanelRows = 6; // of 16
#endif
constexpr int kPanelVectors = 2;
template <class T>
constexpr int kPanelColumns = kPanelVectors * kLanes<T>;

// The deepest panel. A left panel by rows then fits the first-level cache; one line more than a power of two, so
// that its rows do not share cache sets.
template <class T>
constexpr int64_t kMostDepth = 2048 / sizeof(T);
template <class T>
constexpr int64_t kRowPitch = kMostDepth<T> + 64 / sizeof(T);
template <class T>
constexpr int64_t kDepthPitch = (kPanelRows + kLanes<T> - 1) / kLanes<T> * kLanes<T>;

enum LeftLayout : int { kByRows, kByDepth };

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
using MicroKernel = void (*)(int64_t depth, const T* left, const T* right, T* out, int64_t pitch, bool add,
                             Ahead ahead);

template <class T, LeftLayout layout, int rows>
void micro_kernel(int64_t depth, const T* left, const T* right, T* out, int64_t pitch, bool add, Ahead ahead) {
  constexpr int64_t across = layout == kByRows ? kRowPitch<T> : 1, along = layout == kByRows ? 1 : kDepthPitch<T>;
  Vec<T> acc[rows][kPanelVectors] = {};
  for (int r = 0; add && r < rows; ++r) {
    for (int v = 0; v < kPanelVectors; ++v) __builtin_prefetch(out + r * pitch + v * kLanes<T>, 1);
  }
#pragma GCC unroll 2
  for (int64_t d = 0; d < depth; ++d) {
    const Vec<T> first = load_vec(right), second = load_vec(right + kLanes<T>);
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) {
      const Vec<T> value = broadcast(left[r * across]);
      acc[r][0] = fma(value, first, acc[r][0]);
      acc[r][1] = fma(value, second, acc[r][1]);
    }
    __builtin_prefetch(ahead.at, 0, 2);
    ahead.at += ahead.step;
    left += along;
    right += kPanelColumns<T>;
  }
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r) {
    for (int v = 0; v < kPanelVectors; ++v) {
      T* to = out + r * pitch + v * kLanes<T>;
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
template <class T, LeftLayout layout, class = MakeIndices<kPanelRows>>
struct MicroKernels;
template <class T, LeftLayout layout, int... i>
struct MicroKernels<T, layout, Indices<i...>> {
  static constexpr MicroKernel<T> of[] = {nullptr, micro_kernel<T, layout, i + 1>...};
};

// Steps of the depth that are summed one after another in a register: an element is the sum of such chains, so that
// its rounding error grows with their length and their number, not with the depth. A chain more costs a load and a
// store of the tile, which is in the first-level cache.
constexpr int64_t kChain = 128;

// The micro-kernel over the whole of a panel's depth, in equal chains.
template <class T, LeftLayout layout>
void multiply_tile(int rows, int64_t depth, const T* left, const T* right, T* out, int64_t pitch, bool add,
                   Ahead ahead) {
  constexpr int64_t along = layout == kByRows ? 1 : kDepthPitch<T>;
  const MicroKernel<T> multiply = MicroKernels<T, layout>::of[rows];
  const int64_t chains = depth > kChain ? (depth + kChain - 1) / kChain : 1;
  for (int64_t chain = 0; chain < chains; ++chain) {
    const int64_t d = depth * chain / chains, steps = depth * (chain + 1) / chains - d;
    multiply(steps, left + d * along, right + d * kPanelColumns<T>, out, pitch, add || chain > 0,
             {ahead.at + d * ahead.step, ahead.step});
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
