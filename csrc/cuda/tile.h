// Tiles in shared memory: where each chunk of 16 bytes lies, and how it gets there.
//
// An operand is read either along the reduction (Along: a tile row is one row or column of the product and
// holds 128 bytes of the reduction) or across it (Across: a tile row is one step of the reduction and holds
// all rows or columns of the product). Chunks are permuted within a tile row so that both the copies and the
// reads of a warp touch every bank once.
#pragma once

#include "args.h"
#include "types.h"

namespace resnet_fused::cuda {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kBlockRows = 128; // rows of the product in a block, and of a tile of statistics
constexpr int kChunkBytes = 16;

// Bytes from the start of an Along tile to chunk `chunk` (0 to 7) of `row`.
__device__ __forceinline__ int along_offset(int row, int chunk) {
  return (row * 8 + (chunk ^ (row & 7))) * kChunkBytes;
}

// Bytes from the start of an Across tile, kExtent elements wide, to chunk `chunk` of reduction step `row`.
template <class Element, int kExtent>
__device__ __forceinline__ int across_offset(int row, int chunk) {
  // ldmatrix reads 8 steps at one chunk; 32-bit elements are read singly, 4 steps at two chunks.
  const int mix = sizeof(Element) == 2 ? row & 7 : 2 * (row & 3);
  return (row * (kExtent / kPerChunk<Element>) + (chunk ^ mix)) * kChunkBytes;
}

template <class Element, int kExtent>
constexpr int kAlongBytes = kExtent * 128;
template <class Element, int kExtent>
constexpr int kAcrossBytes = 128 / static_cast<int>(sizeof(Element)) * kExtent * static_cast<int>(sizeof(Element));

// Offsets of the rows of a dense matrix; -1 beyond the last one.
struct DenseRows {
  int count;
  int64_t pitch;

  __device__ __forceinline__ int64_t operator()(int row) const { return row < count ? row * pitch : -1; }
};

// Offsets in x of the positions that a strided 1x1 convolution reads, by row of y; -1 beyond the last one.
struct GatheredRows {
  Geometry shape;

  __device__ __forceinline__ int64_t operator()(int row) const {
    if (row >= shape.rows) return -1;
    if (shape.stride_h == 1 && shape.stride_w == 1) return static_cast<int64_t>(row) * shape.C;
    const int q = row % shape.Q, np = row / shape.Q;
    const int p = np % shape.P, n = np / shape.P;
    const int64_t h = static_cast<int64_t>(n) * shape.H + p * shape.stride_h;
    return (h * shape.W + q * shape.stride_w) * shape.C;
  }
};

// Sixteen and four bytes from global to shared memory; zeros, and no access, where `present` is false. Asynchronous
// from 8.0 on; before it there when the call returns, so that what waits for copies finds none.
__device__ __forceinline__ void copy_16(void* shared, const void* global, bool present) {
  if constexpr (kBefore80) {
    store_shared_16(shared, (present ? load_chunk(global) : Chunk{}).words);
  } else {
    cp_async_16(shared, global, present);
  }
}

__device__ __forceinline__ void copy_4(float* shared, const float* global, bool present) {
  if constexpr (kBefore80) {
    *shared = present ? *global : 0.f;
  } else {
    cp_async_4(shared, global, present);
  }
}

// One chunk to shared memory: asynchronously, or element by element where rows are not whole chunks.
// `count` says how many elements from `offset` on exist; none where it is not positive.
template <class Element>
__device__ __forceinline__ void copy_chunk(unsigned char* shared, const Element* base, int64_t offset, int count,
                                           bool aligned) {
  if (aligned) {
    const bool present = count > 0;
    copy_16(shared, present ? base + offset : base, present);
    return;
  }
  float values[kPerChunk<Element>];
#pragma unroll
  for (int i = 0; i < kPerChunk<Element>; ++i) values[i] = i < count ? to_float(base[offset + i]) : 0.f;
  store_shared_16(shared, Packing<Element>::pack(values).words);
}

// Loads Along tiles of kExtent rows, always the same rows: their offsets are kept.
template <class Element, int kExtent>
class AlongLoader {
 public:
  static constexpr int kRowsApart = kThreads / 8;
  static constexpr int kChunks = kExtent / kRowsApart; // of this thread

  template <class Rows>
  __device__ __forceinline__ AlongLoader(const Rows& rows, int first) {
#pragma unroll
    for (int i = 0; i < kChunks; ++i) offsets_[i] = rows(first + own_row(i));
  }

  static __device__ __forceinline__ int own_row(int i) { return static_cast<int>(threadIdx.x) / 8 + i * kRowsApart; }
  static __device__ __forceinline__ int own_chunk() { return static_cast<int>(threadIdx.x) % 8; }

  // Columns [begin, begin + depth) of `extent`.
  __device__ __forceinline__ void load(unsigned char* tile, const Element* base, int begin, int extent,
                                       bool aligned) const {
    const int column = begin + own_chunk() * kPerChunk<Element>;
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      const int count = offsets_[i] < 0 ? 0 : extent - column;
      copy_chunk(tile + along_offset(own_row(i), own_chunk()), base, offsets_[i] + column, count, aligned);
    }
  }

 private:
  int64_t offsets_[kChunks];
};

// Loads Across tiles, kExtent elements wide, of kDepth steps of the reduction.
template <class Element, int kExtent>
struct AcrossLoader {
  static constexpr int kSteps = 128 / static_cast<int>(sizeof(Element));
  static constexpr int kChunksPerRow = kExtent / kPerChunk<Element>;
  static constexpr int kRowsApart = kThreads / kChunksPerRow;
  static constexpr int kChunks = kSteps / kRowsApart; // of this thread

  static __device__ __forceinline__ int own_row(int i) {
    return static_cast<int>(threadIdx.x) / kChunksPerRow + i * kRowsApart;
  }
  static __device__ __forceinline__ int own_chunk() { return static_cast<int>(threadIdx.x) % kChunksPerRow; }

  // Steps [step, step + kSteps) below `end`, columns [begin, begin + kExtent) of `extent`.
  template <class Rows>
  static __device__ __forceinline__ void load(unsigned char* tile, const Element* base, const Rows& rows, int step,
                                              int end, int begin, int extent, bool aligned) {
    const int column = begin + own_chunk() * kPerChunk<Element>;
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      const int row = step + own_row(i);
      const int64_t offset = row < end ? rows(row) : -1;
      const int count = offset < 0 ? 0 : extent - column;
      copy_chunk(tile + across_offset<Element, kExtent>(own_row(i), own_chunk()), base, offset + column, count,
                 aligned);
    }
  }
};

} // namespace resnet_fused::cuda
