// Writing a staged product out: walking it by chunks, reading and writing chunks of an output row, statistics.
#pragma once

#include "staging.h"
#include "tile.h"

namespace resnet_fused::cuda {

// Calls body(row, column) for every chunk of the block's product that this thread writes: kPerChunk columns
// from `column` on, the same ones in every call.
template <class Element, int kColumns, class Body>
__device__ __forceinline__ void for_own_chunks(const Body& body) {
  constexpr int kPerRow = kColumns / kPerChunk<Element>;
  const int column = static_cast<int>(threadIdx.x) % kPerRow * kPerChunk<Element>;
#pragma unroll 1
  for (int row = static_cast<int>(threadIdx.x) / kPerRow; row < kBlockRows; row += kThreads / kPerRow) {
    body(row, column);
  }
}

// kPerChunk elements at `source`, of which `count` exist, as floats; zero beyond.
template <class Element>
__device__ __forceinline__ void load_values(const Element* source, int count, bool aligned, float* values) {
  if (aligned) {
    Packing<Element>::unpack(load_chunk(source), values);
    return;
  }
#pragma unroll
  for (int i = 0; i < kPerChunk<Element>; ++i) values[i] = i < count ? to_float(source[i]) : 0.f;
}

template <class Element>
__device__ __forceinline__ void store_values(Element* target, int count, bool aligned, const float* values) {
  if (aligned) {
    store_chunk(target, Packing<Element>::pack(values));
    return;
  }
#pragma unroll
  for (int i = 0; i < kPerChunk<Element>; ++i) {
    if (i < count) from_float(values[i], target + i);
  }
}

// Count, mean and M2 of each column of the first `rows` rows of a block, as `value(row, column)` gives them:
// two passes over its own rows by each of the threads of a column, merged in order by Chan's formula.
// `scratch` holds 2 * kThreads floats. Writes at partials + (0, 1, 2) * pitch + column, below `columns`.
template <int kColumns, class Value>
__device__ __forceinline__ void column_statistics(const Value& value, int rows, int columns, float* partials,
                                                  int64_t pitch, float* scratch) {
  constexpr int kParts = kThreads / kColumns, kPartRows = kBlockRows / kParts;
  const int column = static_cast<int>(threadIdx.x) % kColumns, part = static_cast<int>(threadIdx.x) / kColumns;
  const int begin = part * kPartRows, end = begin + kPartRows < rows ? begin + kPartRows : rows;
  float sum = 0.f, square = 0.f;
#pragma unroll 4
  for (int row = begin; row < end; ++row) sum += value(row, column);
  const float own_mean = end > begin ? sum / static_cast<float>(end - begin) : 0.f;
#pragma unroll 4
  for (int row = begin; row < end; ++row) {
    const float deviation = value(row, column) - own_mean;
    square += deviation * deviation;
  }
  scratch[threadIdx.x] = own_mean;
  scratch[kThreads + threadIdx.x] = square;
  __syncthreads();
  if (part != 0 || column >= columns) return;
  float count = 0.f, mean = 0.f, m2 = 0.f;
#pragma unroll
  for (int i = 0; i < kParts; ++i) {
    const int own = rows - i * kPartRows < kPartRows ? rows - i * kPartRows : kPartRows;
    if (own <= 0) break;
    const float n = static_cast<float>(own), total = count + n, share = n / total;
    const float delta = scratch[i * kColumns + column] - mean;
    mean += delta * share;
    m2 += scratch[kThreads + i * kColumns + column] + delta * delta * count * share;
    count = total;
  }
  partials[column] = count;
  partials[pitch + column] = mean;
  partials[2 * pitch + column] = m2;
}

} // namespace resnet_fused::cuda
