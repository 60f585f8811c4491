// Matrix products around the micro-kernel: blocks that fit the caches, any prologue, any epilogue.
// Included by kernels.cpp only.
//
// One operand is packed a block at a time and stays in the second-level cache; the other one streams past it,
// a panel or a few at a time. A block of the first is packed once for all that streams past it, and neither is
// ever written to memory packed. What streams is packed again for every block that resides, at about 4 / (columns of
// the block) of the FMAs' time.
//
//   MultiplyRows      the right operand (a weight) resides, rows of activations stream past: forward, dgrad
//   MultiplyColumns   the depth is rows of activations, the left operand resides: wgrad
//
// The order in which an element is summed depends on the depth and its blocks alone, not on who computes it.

// Bytes of the block that resides: of a second-level cache of 1 MiB or more on AVX-512 machines, 256 KiB elsewhere.
constexpr int64_t kResidentBytes = (kVectorBytes == 64 ? 640 : 192) * 1024;
constexpr int64_t kStreamedBytes = (kVectorBytes == 64 ? 256 : 64) * 1024;
constexpr int64_t kPartialBytes = (kVectorBytes == 64 ? 1024 : 256) * 1024;
constexpr int64_t kMostColumns = 1024;
constexpr int64_t kMostAligned = 128;
constexpr int64_t kWholePanels = 126; // rows, of any kPanelRows
static_assert(kWholePanels % kPanelRows == 0 && kWholePanels <= kMostAligned);
static_assert(kResidentBytes + kStreamedBytes + kPartialBytes + 64 * 1024 <= kWorkspaceBytes, "the host allocates it");

// How deep a block is. A product of one block is summed in registers; a deeper one is cut finer, so that more columns
// reside and fewer times the other operand streams past.
template <class T>
int64_t deepest_block(int64_t depth) {
  return depth <= kMostDepth<T> ? kMostDepth<T> : kMostDepth<T> / 2;
}

// [begin, end) cut into equal blocks of at most `most`, a multiple of `unit`.
struct Blocks {
  int64_t begin, end, size;

  Blocks(int64_t first, int64_t last, int64_t most, int64_t unit) : begin(first), end(last), size(unit) {
    const int64_t length = last - first, count = most < length ? (length + most - 1) / most : 1;
    const int64_t even = (length + count - 1) / count;
    if (even > unit) size = (even + unit - 1) / unit * unit;
  }
  int64_t stop(int64_t start) const { return start + size < end ? start + size : end; }
};

// `depth` in equal blocks, at least one.
struct DepthBlocks {
  int64_t depth, count;

  DepthBlocks(int64_t whole, int64_t most) : depth(whole), count(whole > most ? (whole + most - 1) / most : 1) {}
  int64_t start(int64_t block) const { return depth * block / count; }
  int64_t most() const { return (depth + count - 1) / count; }
};

struct Range {
  int64_t begin, end;
};

// store.finish(tile, pitch, row, rows, column, columns) gets each finished tile once, rows in order for a column.
// Store::kTogether: all columns of a block at once, else a panel of them. Panels do not step over multiples of
// store.aligned rows, kMostAligned at most. left.ahead(row, rows, depth, part): what to prefetch of the rows to come.
template <class T, class Left, class PackRight, class Store>
struct MultiplyRows {
  const Left& left;
  const PackRight& pack_right;
  Store& store;
  T* resident;
  T* streamed;
  T* tile;

  MultiplyRows(const Left& l, const PackRight& r, Store& s, void* workspace)
      : left(l),
        pack_right(r),
        store(s),
        resident(static_cast<T*>(workspace)),
        streamed(resident + kResidentBytes / sizeof(T)),
        tile(streamed + kStreamedBytes / sizeof(T)) {}

  void run(Range rows, Range columns, int64_t depth) {
    const DepthBlocks deep(depth, deepest_block<T>(depth));
    const int64_t across = kResidentBytes / sizeof(T) / (deep.most() > 0 ? deep.most() : 1);
    const int64_t limit = deep.count > 1 ? kPartialBytes / sizeof(T) / kMostAligned : kMostColumns;
    const int64_t most = (across < limit ? across : limit) / kPanelColumns<T> * kPanelColumns<T>;
    const Blocks wide(columns.begin, columns.end, most, kPanelColumns<T>);
    const int64_t partial_rows = kPartialBytes / sizeof(T) / wide.size / store.aligned * store.aligned;
    for (int64_t c = wide.begin; c < wide.end; c = wide.stop(c)) {
      const Range own{c, wide.stop(c)};
      const Blocks tall(rows.begin, rows.end, deep.count > 1 ? partial_rows : rows.end - rows.begin, store.aligned);
      for (int64_t r = tall.begin; r < tall.end; r = tall.stop(r)) {
        for (int64_t block = 0; block < deep.count; ++block) {
          const Range steps{deep.start(block), deep.start(block + 1)};
          if (r == tall.begin || deep.count > 1) pack_right(resident, own, steps);
          panels({r, tall.stop(r)}, own, steps, depth);
        }
      }
    }
  }

  void panels(Range rows, Range columns, Range steps, int64_t depth) {
    for (int64_t begin = rows.begin; begin < rows.end;) {
      const int64_t aligned = (begin / store.aligned + 1) * store.aligned;
      const int64_t end = aligned < rows.end ? aligned : rows.end;
      const Panels cut(begin, end, kPanelRows);
      for (int64_t p = 0; p < cut.count; ++p) panel(rows, cut.start(p), cut.rows(p), columns, steps, depth);
      begin = end;
    }
  }

  // Rows of the streamed panel times the block that resides.
  void panel(Range all, int64_t row, int rows, Range columns, Range steps, int64_t depth) {
    const bool first = steps.begin == 0, last = steps.end == depth, whole = first && last;
    const int64_t deep = steps.end - steps.begin;
    const int64_t padded = (columns.end - columns.begin + kPanelColumns<T> - 1) / kPanelColumns<T> * kPanelColumns<T>;
    const int64_t pitch = whole && !Store::kTogether ? kPanelColumns<T> : padded;
    T* at = whole ? tile : tile + (row - all.begin) * padded;
    pack_left_by_rows(left, streamed, row, rows, steps.begin, deep);
    const T* right = resident;
    for (int64_t c = columns.begin, part = 0; c < columns.end; c += kPanelColumns<T>, ++part) {
      T* out = whole && !Store::kTogether ? at : at + (c - columns.begin);
      Ahead ahead = left.ahead(row + rows, rows, steps.begin, deep, part);
      if (ahead.at == nullptr && last) ahead = store.ahead(row, rows, columns.end - columns.begin, deep, part);
      if (ahead.at == nullptr) ahead = {reinterpret_cast<const char*>(streamed), 0};
      multiply_tile<T, kByRows>(rows, deep, streamed, right, out, pitch, !first, ahead);
      right += deep * kPanelColumns<T>;
      const int64_t own = columns.end - c < kPanelColumns<T> ? columns.end - c : kPanelColumns<T>;
      if (last && !Store::kTogether) store.finish(out, pitch, row, rows, c, own);
    }
    if (last && Store::kTogether) store.finish(at, pitch, row, rows, columns.begin, columns.end - columns.begin);
  }
};

// out (rows, columns) = left^T * right over the steps [steps.begin, steps.end): both sources hold a step in a row.
// sums, if not null: of the left one's columns over the steps. left.region(row, rows, columns, i), and right's: memory
// of whole rows of its i-th tensor, to be asked for while the rows before are multiplied.
template <class T, class Left, class Right>
struct MultiplyColumns {
  const Left& left;
  const Right& right;
  T* resident;
  T* streamed;
  T* tile;
  Region regions[3] = {};
  int64_t stride = 0; // bytes of them with each step

  MultiplyColumns(const Left& l, const Right& r, void* workspace)
      : left(l),
        right(r),
        resident(static_cast<T*>(workspace)),
        streamed(resident + kResidentBytes / sizeof(T)),
        tile(streamed + kStreamedBytes / sizeof(T)) {}

  void run(T* out, int64_t pitch, Range rows, Range columns, Range steps, double* sums) {
    const int64_t whole = steps.end - steps.begin;
    const DepthBlocks deep(whole, deepest_block<T>(whole));
    const int64_t unit = deep.most() > 0 ? deep.most() : 1;
    const int64_t most = kResidentBytes / sizeof(T) / (unit * kDepthPitch<T>) * kPanelRows;
    const int64_t panels = kStreamedBytes / sizeof(T) / (unit * kPanelColumns<T>);
    const Blocks tall(rows.begin, rows.end, most, kPanelRows);
    const int64_t wide = (panels > 1 ? panels : 1) * kPanelColumns<T>;
    for (int64_t r = tall.begin; r < tall.end; r = tall.stop(r)) {
      const Panels cut(r, tall.stop(r), kPanelRows);
      for (int64_t block = 0; block < deep.count; ++block) {
        const int64_t step = steps.begin + deep.start(block), depth = steps.begin + deep.start(block + 1) - step;
        pack_left_by_depth(left, resident, cut, step, depth, sums);
        look_ahead(cut, columns, {step + depth, step + 2 * depth < steps.end ? step + 2 * depth : steps.end}, depth);
        for (int64_t c = columns.begin; c < columns.end; c += wide) {
          const int64_t end = c + wide < columns.end ? c + wide : columns.end;
          pack_right_by_depth(right, streamed, c, end, step, depth);
          tiles(out, pitch, cut, {c, end}, depth, block > 0);
        }
      }
    }
  }

  // Shares out the memory of the next block's rows among the tiles of this one.
  void look_ahead(const Panels& cut, Range columns, Range next, int64_t depth) {
    const int64_t across = columns.end - columns.begin, rows = next.end - next.begin;
    for (int i = 0; i < 2; ++i) regions[i] = left.region(next.begin, rows, cut.length, i);
    regions[2] = right.region(next.begin, rows, across, 0);
    const int64_t bytes = regions[0].bytes + regions[1].bytes + regions[2].bytes;
    const int64_t steps = (across + kPanelColumns<T> - 1) / kPanelColumns<T> * cut.count * depth;
    stride = steps > 0 ? (bytes + steps - 1) / steps : 0;
  }

  Ahead take_ahead(int64_t depth) {
    for (Region& region : regions) {
      if (region.bytes <= 0) continue;
      const Ahead own{region.at, stride};
      region.at += stride * depth;
      region.bytes -= stride * depth;
      return own;
    }
    return {reinterpret_cast<const char*>(resident), 0};
  }

  void tiles(T* out, int64_t pitch, const Panels& cut, Range columns, int64_t depth, bool add) {
    const T* panel = streamed;
    for (int64_t c = columns.begin; c < columns.end; c += kPanelColumns<T>, panel += depth * kPanelColumns<T>) {
      const int64_t own = columns.end - c;
      for (int64_t p = 0; p < cut.count; ++p) {
        const int count = cut.rows(p);
        const T* block = resident + p * depth * kDepthPitch<T>;
        T* at = out + cut.start(p) * pitch + c;
        if (own >= kPanelColumns<T>) {
          multiply_tile<T, kByDepth>(count, depth, block, panel, at, pitch, add, take_ahead(depth));
        } else {
          multiply_tile<T, kByDepth>(count, depth, block, panel, tile, kPanelColumns<T>, false, take_ahead(depth));
          put_part(at, pitch, count, own, add);
        }
      }
    }
  }

  // A tile at the right edge: `columns` of its columns exist.
  void put_part(T* out, int64_t pitch, int rows, int64_t columns, bool add) {
    for (int r = 0; r < rows; ++r) {
      for (int64_t j = 0; j < columns; ++j) {
        const T value = tile[r * kPanelColumns<T> + j];
        out[r * pitch + j] = add ? out[r * pitch + j] + value : value;
      }
    }
  }
};
