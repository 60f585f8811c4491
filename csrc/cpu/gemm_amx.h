// The product of a tile by AMX: 15 rows by 64 columns are four tiles of sums, 32 steps of the depth of a row are one
// row of the left tile and as many pairs of 16 columns are a right one. Included by convolutions.cpp only.
//
// Tiles 0 to 3 are sums, 4 is the left one, 5 and 6 are right ones in turns: numbers, as GCC's macros want them.
//
// One step of 32 loads a left and four right tiles and multiplies four times: 5 loads of 8 cycles each beside 4 products
// of 16, counted, not measured.

#if defined(__AMX_BF16__)

// The rows that this thread's tiles are configured for; 0: not at all.
thread_local int tile_rows = 0;

// The tiles of one task: whoever ran on the thread before may have configured others.
struct TileSession {
  TileSession() { tile_rows = 0; }
  ~TileSession() {
    if (tile_rows > 0) _tile_release();
    tile_rows = 0;
  }
  TileSession(const TileSession&) = delete;
  TileSession& operator=(const TileSession&) = delete;
};

inline void configure_tiles(int rows) {
  if (tile_rows == rows) return;
  struct alignas(64) Config {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  } config;
  constexpr int kTiles = 8, kFirstRight = 5;
  for (int tile = 0; tile < kTiles; ++tile) {
    config.row_bytes[tile] = 64;
    config.rows[tile] = static_cast<uint8_t>(tile < kFirstRight ? rows : 16);
  }
  _tile_loadconfig(&config);
  tile_rows = rows;
}

template <int vectors>
void multiply_by_tiles(int64_t depth, const BFloat16* left, const BFloat16* right, float* out, int64_t pitch, bool add,
                       Ahead ahead) {
  constexpr int64_t W = kPanelColumns<BFloat16>, step = kDepthStep<BFloat16>, pairs = 2 * kLanes<BFloat16>;
  constexpr int left_bytes = 2 * kRowPitch<BFloat16>, right_bytes = 4 * W;
  const int out_bytes = static_cast<int>(4 * pitch);
  _tile_zero(0);
  if constexpr (vectors > 1) _tile_zero(1);
  if constexpr (vectors > 2) _tile_zero(2);
  if constexpr (vectors > 3) _tile_zero(3);
  if (add) {
    _tile_loadd(0, out, out_bytes);
    if constexpr (vectors > 1) _tile_loadd(1, out + 16, out_bytes);
    if constexpr (vectors > 2) _tile_loadd(2, out + 32, out_bytes);
    if constexpr (vectors > 3) _tile_loadd(3, out + 48, out_bytes);
  }
  for (int64_t d = 0; d < depth; d += step, left += step, right += step * W) {
    for (int i = 0; i < step / 2; ++i, ahead.at += ahead.step) __builtin_prefetch(ahead.at, 0, 2);
    _tile_loadd(4, left, left_bytes);
    _tile_loadd(5, right, right_bytes);
    _tile_dpbf16ps(0, 4, 5);
    if constexpr (vectors > 1) {
      _tile_loadd(6, right + pairs, right_bytes);
      _tile_dpbf16ps(1, 4, 6);
    }
    if constexpr (vectors > 2) {
      _tile_loadd(5, right + 2 * pairs, right_bytes);
      _tile_dpbf16ps(2, 4, 5);
    }
    if constexpr (vectors > 3) {
      _tile_loadd(6, right + 3 * pairs, right_bytes);
      _tile_dpbf16ps(3, 4, 6);
    }
  }
  _tile_stored(0, out, out_bytes);
  if constexpr (vectors > 1) _tile_stored(1, out + 16, out_bytes);
  if constexpr (vectors > 2) _tile_stored(2, out + 32, out_bytes);
  if constexpr (vectors > 3) _tile_stored(3, out + 48, out_bytes);
}

void multiply_by_amx(int rows, int64_t vectors, int64_t depth, const BFloat16* left, const BFloat16* right, float* out,
                     int64_t pitch, bool add, Ahead ahead) {
  configure_tiles(rows);
  if (vectors == 1) return multiply_by_tiles<1>(depth, left, right, out, pitch, add, ahead);
  if (vectors == 2) return multiply_by_tiles<2>(depth, left, right, out, pitch, add, ahead);
  if (vectors == 3) return multiply_by_tiles<3>(depth, left, right, out, pitch, add, ahead);
  multiply_by_tiles<4>(depth, left, right, out, pitch, add, ahead);
}

#else

struct TileSession {
  TileSession() {} // not trivial: an object that is never read is no mistake
};

#endif
