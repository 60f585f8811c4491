// The product of one block: 128 rows by kColumns, one slice of 128 bytes of the reduction at a time.
// Operand layouts are those of tile.h.
#pragma once

#include "staging.h"
#include "tile.h"

namespace resnet_fused::cuda {

enum Layout : int { kAlong, kAcross };

// Eight warps, each with a rectangle of kWarpRows x 32 of the product.
template <int kColumns>
struct WarpTile {
  static constexpr int kAcrossWarps = kColumns / 32;
  static constexpr int kDownWarps = kWarps / kAcrossWarps;
  static constexpr int kWarpRows = kBlockRows / kDownWarps;
  static constexpr int kWarpColumns = 32;

  static __device__ __forceinline__ int first_row() {
    return static_cast<int>(threadIdx.x) / 32 / kAcrossWarps * kWarpRows;
  }
  static __device__ __forceinline__ int first_column() {
    return static_cast<int>(threadIdx.x) / 32 % kAcrossWarps * kWarpColumns;
  }
};

// On the tensor cores: mma.sync of 16x8 pieces, 32 bytes of the reduction at a time.
template <class Math, Layout kLayoutA, Layout kLayoutB, int kColumns>
class TensorProduct {
  using Element = typename Math::Element;
  using Warp = WarpTile<kColumns>;
  static constexpr int kDown = Warp::kWarpRows / 16, kSide = Warp::kWarpColumns / 8;
  static constexpr int kStep = 32 / static_cast<int>(sizeof(Element)); // of the reduction

 public:
  static constexpr StagingOrder kStaging = kPairsByRow;

  __device__ __forceinline__ void multiply(const unsigned char* a_tile, const unsigned char* b_tile) {
    const int row = Warp::first_row(), column = Warp::first_column();
#pragma unroll
    for (int step = 0; step < kDepth<Math> / kStep; ++step) {
      uint32_t a[kDown][4], b[kSide][2];
#pragma unroll
      for (int i = 0; i < kDown; ++i) load_a(a[i], a_tile, row + 16 * i, step);
#pragma unroll
      for (int j = 0; j < kSide; j += 2) load_b(b[j], b_tile, column + 8 * j, step);
#pragma unroll
      for (int i = 0; i < kDown; ++i) {
#pragma unroll
        for (int j = 0; j < kSide; ++j) Math::mma(acc_[i][j], a[i], b[j]);
      }
    }
  }

  template <int kWidth>
  __device__ __forceinline__ void store(const Staging<kWidth, kStaging>& staging) const {
    const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
    for (int i = 0; i < kDown; ++i) {
#pragma unroll
      for (int j = 0; j < kSide; ++j) {
        const int row = Warp::first_row() + 16 * i + lane / 4, column = Warp::first_column() + 8 * j + lane % 4 * 2;
        staging.store_pair(row, column, acc_[i][j]);
        staging.store_pair(row + 8, column, acc_[i][j] + 2);
      }
    }
  }

 private:
  static __device__ __forceinline__ uint32_t as_operand(uint32_t bits) {
    if constexpr (sizeof(Element) == 4) return round_to_tf32(bits);
    return bits;
  }

  // Rows [row, row + 16).
  static __device__ __forceinline__ void load_a(uint32_t* a, const unsigned char* tile, int row, int step) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    if constexpr (kLayoutA == kAlong) {
      ldmatrix(a, tile + along_offset(row + lane % 16, 2 * step + lane / 16));
    } else if constexpr (sizeof(Element) == 2) {
      const int at = step * kStep + lane % 8 + 8 * (lane / 16);
      ldmatrix_transposed(a, tile + across_offset<Element, kBlockRows>(at, row / 8 + lane / 8 % 2));
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        a[i] = word<kBlockRows>(tile, step * kStep + lane % 4 + 4 * (i / 2), row + lane / 4 + 8 * (i % 2));
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = as_operand(a[i]);
  }

  // Columns [column, column + 16): two pieces of two registers.
  static __device__ __forceinline__ void load_b(uint32_t* b, const unsigned char* tile, int column, int step) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    if constexpr (kLayoutB == kAlong) {
      ldmatrix(b, tile + along_offset(column + lane % 8 + 8 * (lane / 16), 2 * step + lane / 8 % 2));
    } else if constexpr (sizeof(Element) == 2) {
      ldmatrix_transposed(b, tile + across_offset<Element, kColumns>(step * kStep + lane % 16, column / 8 + lane / 16));
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        b[i] = word<kColumns>(tile, step * kStep + lane % 4 + 4 * (i % 2), column + lane / 4 + 8 * (i / 2));
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) b[i] = as_operand(b[i]);
  }

  template <int kExtent>
  static __device__ __forceinline__ uint32_t word(const unsigned char* tile, int row, int column) {
    return *reinterpret_cast<const uint32_t*>(tile + across_offset<Element, kExtent>(row, column / 4) + column % 4 * 4);
  }

  float acc_[kDown][kSide][4] = {};
};

// float32 by fused multiply-add: every thread has kDown rows and 8 columns, and takes four elements, a quad, at a time.
template <class Math, Layout kLayoutA, Layout kLayoutB, int kColumns>
class FmaProduct {
  using Element = typename Math::Element;
  using Warp = WarpTile<kColumns>;
  static constexpr int kDown = Warp::kWarpRows / 8, kSide = 8;

 public:
  static constexpr StagingOrder kStaging = kLayoutA == kAlong ? kQuadsByRow : kQuadsByFourRows;

  __device__ __forceinline__ void multiply(const unsigned char* a_tile, const unsigned char* b_tile) {
#pragma unroll 1
    for (int step = 0; step < kDepth<Math> / 4; ++step) {
      float a[kDown][4];
      load_a(a, a_tile, step);
      if constexpr (kLayoutB == kAlong) {
#pragma unroll
        for (int j = 0; j < kSide; ++j) {
          float b[4];
          along_quad(b, b_tile, column(j), step);
#pragma unroll
          for (int k = 0; k < 4; ++k) {
#pragma unroll
            for (int i = 0; i < kDown; ++i) acc_[i][j] += a[i][k] * b[k];
          }
        }
      } else {
#pragma unroll
        for (int k = 0; k < 4; ++k) {
#pragma unroll
          for (int j = 0; j < kSide; j += 4) {
            float b[4];
            across_quad<kColumns>(b, b_tile, 4 * step + k, column(j));
#pragma unroll
            for (int i = 0; i < kDown; ++i) {
#pragma unroll
              for (int n = 0; n < 4; ++n) acc_[i][j + n] += a[i][k] * b[n];
            }
          }
        }
      }
    }
  }

  template <int kWidth>
  __device__ __forceinline__ void store(const Staging<kWidth, kStaging>& staging) const {
#pragma unroll
    for (int i = 0; i < kDown; ++i) {
#pragma unroll
      for (int j = 0; j < kSide; j += 4) staging.store_quad(row(i), column(j), acc_[i] + j);
    }
  }

 private:
  // Lanes 0 to 7 have different rows: with Along operands 8 different rows, else 8 quads of rows side by side.
  static __device__ __forceinline__ int row(int i) {
    const int lane = static_cast<int>(threadIdx.x) % 8;
    return Warp::first_row() + (kLayoutA == kAlong ? lane + 8 * i : 4 * lane + i % 4 + 32 * (i / 4));
  }
  static __device__ __forceinline__ int column(int j) {
    return Warp::first_column() + static_cast<int>(threadIdx.x) % 32 / 8 * 4 + j % 4 + 16 * (j / 4);
  }

  // Quad `step` of the reduction at `row` of an Along tile.
  static __device__ __forceinline__ void along_quad(float* values, const unsigned char* tile, int row, int step) {
    const int offset = along_offset(row, 4 * step / kPerChunk<Element>);
    load_quad(reinterpret_cast<const Element*>(tile + offset) + 4 * step % kPerChunk<Element>, values);
  }

  // The quad from `at` on of row `step` of an Across tile.
  template <int kExtent>
  static __device__ __forceinline__ void across_quad(float* values, const unsigned char* tile, int step, int at) {
    const int offset = across_offset<Element, kExtent>(step, at / kPerChunk<Element>);
    load_quad(reinterpret_cast<const Element*>(tile + offset) + at % kPerChunk<Element>, values);
  }

  static __device__ __forceinline__ void load_a(float (*a)[4], const unsigned char* tile, int step) {
    if constexpr (kLayoutA == kAlong) {
#pragma unroll
      for (int i = 0; i < kDown; ++i) along_quad(a[i], tile, row(i), step);
    } else {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
#pragma unroll
        for (int i = 0; i < kDown; i += 4) {
          float rows[4];
          across_quad<kBlockRows>(rows, tile, 4 * step + k, row(i));
#pragma unroll
          for (int m = 0; m < 4; ++m) a[i + m][k] = rows[m];
        }
      }
    }
  }

  float acc_[kDown][kSide] = {};
};

// Blocks that must fit on a multiprocessor's registers: two where the accumulators leave room for the rest. Before
// 8.0 shared memory has room for one.
template <class Math, int kColumns>
constexpr int kFwdBlocks = !kBefore80 && (Math::kTensorCores || kColumns == 64) ? 2 : 1;
template <class Math, int kColumns>
constexpr int kBackwardBlocks =
    !kBefore80 && kColumns == 64 && (!Math::kTensorCores || sizeof(typename Math::Element) == 2) ? 2 : 1;

template <bool kTensorCores>
struct ProductOf {
  template <class Math, Layout kLayoutA, Layout kLayoutB, int kColumns>
  using type = TensorProduct<Math, kLayoutA, kLayoutB, kColumns>;
};
template <>
struct ProductOf<false> {
  template <class Math, Layout kLayoutA, Layout kLayoutB, int kColumns>
  using type = FmaProduct<Math, kLayoutA, kLayoutB, kColumns>;
};
template <class Math, Layout kLayoutA, Layout kLayoutB, int kColumns>
using Product = typename ProductOf<Math::kTensorCores>::template type<Math, kLayoutA, kLayoutB, kColumns>;

} // namespace resnet_fused::cuda
