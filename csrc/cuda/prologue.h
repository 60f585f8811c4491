// The backward of batch norm, applied to a gradient as it is loaded:
//   dy = a * g + b * (y - mean) + c    a = scale    b = -scale * rstd * sums[1] / count    c = -scale * sums[0] / count
// With running statistics dy = scale * g, and y has no part in it.
#pragma once

#include "staging.h"
#include "tile.h"

namespace resnet_fused::cuda {

// The rows of moments and sums that the coefficients are made of, in the order they are kept in.
enum CoefficientRow : int { kMean, kRstd, kScale, kInverse, kSumG, kSumGX, kCoefficientRows };

__device__ __forceinline__ const float* coefficient_row(const float* moments, const float* sums, int row, int K) {
  switch (row) {
    case kMean:
      return moments + static_cast<int64_t>(kRowMean) * K;
    case kRstd:
      return moments + static_cast<int64_t>(kRowRstd) * K;
    case kScale:
      return moments + static_cast<int64_t>(kRowScale) * K;
    case kInverse:
      return moments + static_cast<int64_t>(kRowInverse) * K;
    case kSumG:
      return sums;
    default:
      return sums + K;
  }
}

// The coefficients of kCount channels.
template <int kCount>
struct Coefficients {
  float a[kCount], b[kCount], mean[kCount], c[kCount];

  // From a table in shared memory, kWidth channels a row in the order of CoefficientRow; from `column` on.
  template <int kWidth>
  static __device__ __forceinline__ Coefficients from(const float* table, int column, int prologue) {
    const auto row = [&](int r, float* values) {
      load_spread<kCount>([&](int at) { return table + r * kWidth + at; }, column, values);
    };
    Coefficients k;
    row(kScale, k.a);
    if (prologue != kBatchStatistics) return k;
    float rstd[kCount], inverse[kCount];
    row(kMean, k.mean);
    row(kRstd, rstd);
    row(kInverse, inverse);
    row(kSumG, k.c);
    row(kSumGX, k.b);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      k.b[i] *= -k.a[i] * rstd[i] * inverse[i];
      k.c[i] *= -k.a[i] * inverse[i];
    }
    return k;
  }
};

// Asks for the table of channels [first, first + kWidth); zeros beyond the last one.
template <int kWidth>
__device__ __forceinline__ void load_coefficients(float* table, const float* moments, const float* sums, int first,
                                                  int K, int prologue) {
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < kCoefficientRows * kWidth; i += kThreads) {
    const int row = i / kWidth, channel = first + i % kWidth;
    if (prologue != kBatchStatistics && row != kScale) continue;
    const bool present = channel < K;
    const float* source = coefficient_row(moments, sums, row, K);
    copy_4(table + i, present ? source + channel : source, present);
  }
}

// dy of a chunk of g in shared memory, in place, rounded to the element type; y's chunk beside it.
template <class Element>
__device__ __forceinline__ void apply_prologue(unsigned char* g_chunk, const unsigned char* y_chunk,
                                               const Coefficients<kPerChunk<Element>>& k, int prologue) {
  constexpr int kCount = kPerChunk<Element>;
  float dy[kCount];
  Packing<Element>::unpack(load_chunk(g_chunk), dy);
#pragma unroll
  for (int i = 0; i < kCount; ++i) dy[i] *= k.a[i];
  if (prologue == kBatchStatistics) {
    float y[kCount];
    Packing<Element>::unpack(load_chunk(y_chunk), y);
#pragma unroll
    for (int i = 0; i < kCount; ++i) dy[i] += k.b[i] * (y[i] - k.mean[i]) + k.c[i];
  }
  store_shared_16(g_chunk, Packing<Element>::pack(dy).words);
}

} // namespace resnet_fused::cuda
