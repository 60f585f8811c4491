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
constexpr int64_t kWholePanels = 120; // rows, of any kPanelRows
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

constexpr int64_t kDepthUnit = 32;

// `depth` in even blocks, at least one.
struct DepthBlocks {
  int64_t depth, count;

  DepthBlocks(int64_t whole, int64_t most) : depth(whole), count(whole > most ? (whole + most - 1) / most : 1) {}
  // Whole vectors of any type, but for the end.
  int64_t start(int64_t block) const {
    return block == count ? depth : depth * block / count / kDepthUnit * kDepthUnit;
  }
  int64_t most() const { return count > 1 ? (depth / count + kDepthUnit) / kDepthUnit * kDepthUnit : depth; }
};

struct Range {
  int64_t begin, end;
};

// Memory that is read soon, asked for in even pieces while tiles are computed.
class LookAhead {
 public:
  explicit LookAhead(const void* idle) : idle_(static_cast<const char*>(idle)) {}

  void add(const void* at, int64_t bytes) {
    if (bytes > 0 && count_ < kMost) regions_[count_++] = {static_cast<const char*>(at), bytes};
  }
  // Spreads it over `steps` of the depth.
  void share(int64_t steps) {
    int64_t bytes = 0;
    for (int i = 0; i < count_; ++i) bytes += regions_[i].bytes;
    stride_ = steps > 0 ? (bytes + steps - 1) / steps : 0;
  }
  Ahead take(int64_t depth) {
    for (; next_ < count_; ++next_) {
      Region& region = regions_[next_];
      if (region.bytes <= 0) continue;
      const Ahead own{region.at, stride_};
      region.at += stride_ * depth;
      region.bytes -= stride_ * depth;
      return own;
    }
    return {idle_, 0};
  }

 private:
  static constexpr int kMost = 20;
  Region regions_[kMost];
  int count_ = 0, next_ = 0;
  int64_t stride_ = 0;
  const char* idle_;
};

// A right operand that is packed a block at a time, into the memory that resides: pack(memory, columns, steps).
template <class T, class Pack>
struct PackedOnDemand {
  static constexpr bool kReady = false;
  const Pack& pack;

  const T* block(T* resident, Range columns, Range steps, bool fresh) const {
    if (fresh) pack(resident, columns, steps);
    return resident;
  }
};

// One that was packed before, for all tasks: the blocks of the depth one after another, of `columns` columns each.
template <class T>
struct PackedBefore {
  static constexpr bool kReady = true;
  const T* data;
  int64_t columns; // whole panels

  const T* block(T*, Range own, Range steps, bool) const {
    return data + steps.begin * columns + own.begin * whole_steps<T>(steps.end - steps.begin);
  }
};

// store.finish(tile, pitch, row, rows, column, columns) gets each finished tile once, rows in order for a column.
// Store::kTogether: all columns of a block at once, else a panel of them. Panels do not step over multiples of
// store.aligned rows, kMostAligned at most. left.ahead(look, row, rows, first, depth), store.ahead(look, row, rows,
// column, columns): what to ask memory for meanwhile.
template <class T, class Left, class Right, class Store>
struct MultiplyRows {
  const Left& left;
  const Right& right;
  Store& store;
  T* resident;
  T* streamed;
  Opmath<T>* tile;

  MultiplyRows(const Left& l, const Right& r, Store& s, void* workspace)
      : left(l),
        right(r),
        store(s),
        resident(static_cast<T*>(workspace)),
        streamed(resident + kResidentBytes / sizeof(T)),
        tile(reinterpret_cast<Opmath<T>*>(streamed + kStreamedBytes / sizeof(T))) {}

  void run(Range rows, Range columns, int64_t depth) {
    const DepthBlocks deep(depth, deepest_block<T>(depth));
    const int64_t across = kResidentBytes / sizeof(T) / (deep.most() > 0 ? whole_steps<T>(deep.most()) : 1);
    const int64_t limit = deep.count > 1 ? kPartialBytes / sizeof(Opmath<T>) / kMostAligned : kMostColumns;
    const int64_t most = (across < limit ? across : limit) / kPanelColumns<T> * kPanelColumns<T>;
    const Blocks wide(columns.begin, columns.end, most, kPanelColumns<T>);
    // partial sums are few enough to stay in the caches, unless a block would be packed for too few rows
    const int64_t fit = kPartialBytes / sizeof(Opmath<T>) / wide.size / store.aligned * store.aligned;
    const int64_t partial = Right::kReady ? store.aligned : fit;
    for (int64_t c = wide.begin; c < wide.end; c = wide.stop(c)) {
      const Range own{c, wide.stop(c)};
      const Blocks tall(rows.begin, rows.end, deep.count > 1 ? partial : rows.end - rows.begin, store.aligned);
      for (int64_t r = tall.begin; r < tall.end; r = tall.stop(r)) {
        for (int64_t block = 0; block < deep.count; ++block) {
          const Range steps{deep.start(block), deep.start(block + 1)};
          const T* packed = right.block(resident, own, steps, r == tall.begin || deep.count > 1);
          panels({r, tall.stop(r)}, own, steps, depth, packed);
        }
      }
    }
  }

  void panels(Range rows, Range columns, Range steps, int64_t depth, const T* packed) {
    for (int64_t begin = rows.begin; begin < rows.end;) {
      const int64_t aligned = (begin / store.aligned + 1) * store.aligned;
      const int64_t end = aligned < rows.end ? aligned : rows.end;
      const Panels cut(begin, end, kPanelRows);
      for (int64_t p = 0; p < cut.count; ++p) panel(rows, cut.start(p), cut.rows(p), columns, steps, depth, packed);
      begin = end;
    }
  }

  // Rows of the streamed panel times the block that resides.
  void panel(Range all, int64_t row, int rows, Range columns, Range steps, int64_t depth, const T* packed) {
    const bool first = steps.begin == 0, last = steps.end == depth, whole = first && last;
    const int64_t own_depth = steps.end - steps.begin, deep = whole_steps<T>(own_depth);
    const int64_t width = columns.end - columns.begin;
    const int64_t parts = (width + kPanelColumns<T> - 1) / kPanelColumns<T>, padded = parts * kPanelColumns<T>;
    const int64_t pitch = whole && !Store::kTogether ? kPanelColumns<T> : padded;
    Opmath<T>* at = whole ? tile : tile + (row - all.begin) * padded;
    pack_left_by_rows(left, streamed, row, rows, steps.begin, own_depth);
    LookAhead look(streamed);
    left.ahead(look, row + rows, rows, steps.begin, own_depth);
    if (last) store.ahead(look, row, rows, columns.begin, width);
    const int64_t calls = calls_of_tile<T>(rows, width, deep);
    look.share(parts * calls);
    for (int64_t c = columns.begin; c < columns.end; c += kPanelColumns<T>) {
      Opmath<T>* out = whole && !Store::kTogether ? at : at + (c - columns.begin);
      const int64_t own = columns.end - c < kPanelColumns<T> ? columns.end - c : kPanelColumns<T>;
      multiply_tile<T, kByRows>(rows, own, deep, streamed, packed, out, pitch, !first, look.take(calls));
      packed += deep * kPanelColumns<T>;
      if (last && !Store::kTogether) store.finish(out, pitch, row, rows, c, own);
    }
    if (last && Store::kTogether) store.finish(at, pitch, row, rows, columns.begin, width);
  }
};

// out (rows, columns) = left^T * right over the steps [steps.begin, steps.end): both sources hold a step in a row.
// sums, if not null: of the left one's columns over the steps. right.part(i) of right.parts() holds `columns` of the
// result's columns each. left.region(look, row, rows, columns), and right's: whole rows to ask memory for while the rows
// before are multiplied.
template <class T, class Left, class Right>
struct MultiplyColumns {
  const Left& left;
  const Right& right;
  T* resident;
  T* streamed;
  Opmath<T>* tile;

  MultiplyColumns(const Left& l, const Right& r, void* workspace)
      : left(l),
        right(r),
        resident(static_cast<T*>(workspace)),
        streamed(resident + kResidentBytes / sizeof(T)),
        tile(reinterpret_cast<Opmath<T>*>(streamed + kStreamedBytes / sizeof(T))) {}

  void run(Opmath<T>* out, int64_t pitch, Range rows, Range columns, Range steps, double* sums, bool add = false) {
    const int64_t whole = steps.end - steps.begin;
    const DepthBlocks deep(whole, deepest_block<T>(whole));
    const int64_t unit = deep.most() > 0 ? whole_steps<T>(deep.most()) : 1;
    const int64_t most = kResidentBytes / sizeof(T) / left_panel<T>(unit) * kPanelRows;
    const int64_t panels = kStreamedBytes / sizeof(T) / (unit * kPanelColumns<T>);
    const Blocks tall(rows.begin, rows.end, most, kPanelRows);
    const int64_t wide = (panels > 1 ? panels : 1) * kPanelColumns<T>;
    for (int64_t r = tall.begin; r < tall.end; r = tall.stop(r)) {
      const Panels cut(r, tall.stop(r), kPanelRows);
      for (int64_t block = 0; block < deep.count; ++block) {
        const int64_t step = steps.begin + deep.start(block), depth = steps.begin + deep.start(block + 1) - step;
        pack_left_by_depth(left, resident, cut, step, depth, sums);
        LookAhead look(resident);
        const int64_t across = columns.end - columns.begin, next = step + depth;
        const int64_t more = next + depth < steps.end ? depth : steps.end - next;
        left.region(look, next, more, cut.length);
        right.region(look, next, more, across);
        const int64_t calls = calls_of_tile<T>(kPanelRows, across, whole_steps<T>(depth));
        look.share((across + kPanelColumns<T> - 1) / kPanelColumns<T> * right.parts() * cut.count * calls);
        for (int64_t part = 0; part < right.parts(); ++part) {
          for (int64_t c = columns.begin; c < columns.end; c += wide) {
            const int64_t end = c + wide < columns.end ? c + wide : columns.end;
            pack_right_by_depth(right.part(part), streamed, c, end, step, depth);
            tiles(out + part * columns.end, pitch, cut, {c, end}, depth, add || block > 0, look);
          }
        }
      }
    }
  }

  void tiles(Opmath<T>* out, int64_t pitch, const Panels& cut, Range columns, int64_t steps, bool add,
             LookAhead& look) {
    const T* panel = streamed;
    const int64_t depth = whole_steps<T>(steps);
    for (int64_t c = columns.begin; c < columns.end; c += kPanelColumns<T>, panel += depth * kPanelColumns<T>) {
      const int64_t own = columns.end - c;
      for (int64_t p = 0; p < cut.count; ++p) {
        const int count = cut.rows(p);
        const T* block = resident + p * left_panel<T>(depth);
        Opmath<T>* at = out + cut.start(p) * pitch + c;
        const Ahead ahead = look.take(calls_of_tile<T>(count, own, depth));
        if (own >= kPanelColumns<T>) {
          multiply_tile<T, kLeftByDepth<T>>(count, own, depth, block, panel, at, pitch, add, ahead);
        } else {
          multiply_tile<T, kLeftByDepth<T>>(count, own, depth, block, panel, tile, kPanelColumns<T>, false, ahead);
          put_part(at, pitch, count, own, add);
        }
      }
    }
  }

  // A tile at the right edge: `columns` of its columns exist.
  void put_part(Opmath<T>* out, int64_t pitch, int rows, int64_t columns, bool add) {
    for (int r = 0; r < rows; ++r) {
      for (int64_t j = 0; j < columns; ++j) {
        const Opmath<T> value = tile[r * kPanelColumns<T> + j];
        out[r * pitch + j] = add ? out[r * pitch + j] + value : value;
      }
    }
  }
};
