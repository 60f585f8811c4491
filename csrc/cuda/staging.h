// The product of a block in shared memory as float32, so that it can be written out in whole rows.
#pragma once

#include "types.h"

namespace resnet_fused::cuda {

// How the owners of the product hand it over; the permutation of chunks follows, so that no bank is hit twice.
enum StagingOrder : int {
  kPairsByRow,     // 4 rows, 4 pairs of columns each
  kQuadsByRow,     // 8 rows, one quad of columns each
  kQuadsByFourRows // the same, rows 4 apart
};

// kCount (4 or 8) floats from `column` on, of a thread whose neighbour has the next kCount; `at(column)` is the
// address of a quad. Eight threads would read every other quad: half of them begin with the odd ones, so that
// no bank is hit twice.
template <int kCount, class At>
__device__ __forceinline__ void load_spread(const At& at, int column, float* values) {
  const auto quad = [&](int c, float* out) { Packing<float>::unpack(load_chunk(at(c)), out); };
  if constexpr (kCount == 4) {
    quad(column, values);
  } else {
    const bool swapped = column / 8 % 8 >= 4;
    float first[4], second[4];
    quad(column + (swapped ? 4 : 0), first);
    quad(column + (swapped ? 0 : 4), second);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      values[i] = swapped ? second[i] : first[i];
      values[i + 4] = swapped ? first[i] : second[i];
    }
  }
}

template <int kColumns, StagingOrder kOrder>
class Staging {
 public:
  static constexpr int kBytes = 128 * kColumns * 4;

  explicit __device__ __forceinline__ Staging(unsigned char* shared) : data_(reinterpret_cast<float*>(shared)) {}

  __device__ __forceinline__ float* at(int row, int column) const {
    const int mix = kOrder == kPairsByRow ? 2 * (row & 3) : kOrder == kQuadsByRow ? row & 7 : row >> 2 & 7;
    return data_ + row * kColumns + ((column / 4) ^ mix) * 4 + column % 4;
  }

  __device__ __forceinline__ void store_pair(int row, int column, const float* values) const {
    store_shared_8(at(row, column), values[0], values[1]);
  }

  __device__ __forceinline__ void store_quad(int row, int column, const float* values) const {
    store_shared_16(at(row, column), Packing<float>::pack(values).words);
  }

  // kCount values from `column` on, of a thread whose neighbour has the next kCount.
  template <int kCount>
  __device__ __forceinline__ void load(int row, int column, float* values) const {
    load_spread<kCount>([&](int c) { return at(row, c); }, column, values);
  }

 private:
  float* data_;
};

} // namespace resnet_fused::cuda
