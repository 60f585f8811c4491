// y[npq, k] = sum over c of x[gathered npq, c] * weight[k, c], and one of two epilogues:
//   training   + bias, stored; count, mean and M2 of every 128 rows of what was stored
//   inference  relu(affine(y + bias) + affine of the main branch)
#pragma once

#include "epilogue.h"
#include "product.h"

namespace resnet_fused::cuda {

// What the epilogue wants to know of a channel: the bias, and the affines z = scale * (y - mean) + shift of the
// product and of the main branch.
enum ChannelRow : int { kBias, kOwnMean, kOwnScale, kOwnShift, kAddMean, kAddScale, kAddShift, kChannelRows };

template <class Math, int kColumns, bool kOld = kBefore80>
struct FwdShared {
  using Element = typename Math::Element;
  static constexpr int kStages = kOld ? 2 : 3;
  static constexpr int kWeight = kAlongBytes<Element, kBlockRows>;
  static constexpr int kStageBytes = kWeight + kAlongBytes<Element, kColumns>;
  static constexpr int kChannels = kBlockRows * kColumns * 4; // behind the staged product
  static constexpr int kScratch = kChannels + kChannelRows * kColumns * 4;
  static constexpr int kStagingBytes = kScratch + 2 * kThreads * 4;

  // Bytes for a reduction over C channels: no more stages than it has slices.
  static int bytes(int C) {
    const int slices = (C + kDepth<Math> - 1) / kDepth<Math>;
    const int stages = slices < kStages ? slices : kStages;
    return stages * kStageBytes > kStagingBytes ? stages * kStageBytes : kStagingBytes;
  }
};

template <class Math, int kColumns, class Product>
__device__ __forceinline__ void fwd_main_loop(const FwdArgs& args, int row, int column, unsigned char* shared,
                                              Product& product) {
  using Element = typename Math::Element;
  using Shared = FwdShared<Math, kColumns>;
  const int C = args.shape.C, slices = (C + kDepth<Math> - 1) / kDepth<Math>;
  const AlongLoader<Element, kBlockRows> x(GatheredRows{args.shape}, row);
  const AlongLoader<Element, kColumns> weight(DenseRows{args.shape.K, C}, column);
  const auto load = [&](int slice) {
    if (slice < slices) {
      unsigned char* stage = shared + slice % Shared::kStages * Shared::kStageBytes;
      const int begin = slice * kDepth<Math>;
      x.load(stage, static_cast<const Element*>(args.x), begin, C, args.x_aligned);
      weight.load(stage + Shared::kWeight, static_cast<const Element*>(args.weight), begin, C, args.weight_aligned);
    }
    cp_async_commit();
  };
#pragma unroll
  for (int slice = 0; slice < Shared::kStages - 1; ++slice) load(slice);
#pragma unroll 1
  for (int slice = 0; slice < slices; ++slice) {
    cp_async_wait<Shared::kStages - 2>();
    __syncthreads();
    load(slice + Shared::kStages - 1);
    const unsigned char* stage = shared + slice % Shared::kStages * Shared::kStageBytes;
    product.multiply(stage, stage + Shared::kWeight);
  }
}

// The block's channels to shared memory; zeros beyond the last one, and where there is no table.
template <int kColumns>
__device__ __forceinline__ void fwd_load_channels(const FwdArgs& args, int column, float* channels) {
  const int own = static_cast<int>(threadIdx.x) % kColumns, K = args.shape.K;
#pragma unroll 1
  for (int row = static_cast<int>(threadIdx.x) / kColumns; row < kChannelRows; row += kThreads / kColumns) {
    const float* table = row == kBias ? args.bias : row < kAddMean ? args.moments : args.add_moments;
    const int kind = row == kBias ? 0 : (row - kOwnMean) % 3, of_table = kind == 0 ? kRowMean : kind + kRowRstd;
    const bool present = table != nullptr && column + own < K;
    const int64_t at = (row == kBias ? 0 : static_cast<int64_t>(of_table) * K) + column + own;
    channels[row * kColumns + own] = present ? table[at] : 0.f;
  }
}

// The epilogue's constants of kCount channels.
template <int kCount>
struct ChannelConstants {
  float rows[kChannelRows][kCount];

  template <int kColumns>
  static __device__ __forceinline__ ChannelConstants from(const float* channels, int column) {
    ChannelConstants k;
#pragma unroll
    for (int row = 0; row < kChannelRows; ++row) {
      load_spread<kCount>([&](int at) { return channels + row * kColumns + at; }, column, k.rows[row]);
    }
    return k;
  }
  __device__ __forceinline__ float affine(int first_row, int i, float y) const {
    return rows[first_row + 1][i] * (y - rows[first_row][i]) + rows[first_row + 2][i];
  }
};

// out = relu(affine(value + bias) + affine(add)) over the chunks of the block.
template <class Element, int kColumns, class Stage>
__device__ __forceinline__ void fwd_write(const FwdArgs& args, int row, int column, const float* channels,
                                          const Stage& staging) {
  constexpr int kCount = kPerChunk<Element>;
  const int K = args.shape.K, within = static_cast<int>(threadIdx.x) % (kColumns / kCount) * kCount;
  const int own = column + within;
  const auto k = ChannelConstants<kCount>::template from<kColumns>(channels, within);
  for_own_chunks<Element, kColumns>([&](int block_row, int block_column) {
    if (own >= K || row + block_row >= args.shape.rows) return;
    const int64_t at = static_cast<int64_t>(row + block_row) * K + own;
    float values[kCount];
    staging.template load<kCount>(block_row, block_column, values);
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] += k.rows[kBias][i];
    if (args.moments != nullptr) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) values[i] = k.affine(kOwnMean, i, values[i]);
    }
    if (args.add != nullptr) {
      float add[kCount];
      load_values(static_cast<const Element*>(args.add) + at, K - own, args.out_aligned, add);
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        values[i] += args.add_moments != nullptr ? k.affine(kAddMean, i, add[i]) : add[i];
      }
    }
    if (args.relu) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) values[i] = values[i] <= 0.f ? 0.f : values[i];
    }
    store_values(static_cast<Element*>(args.out) + at, K - own, args.out_aligned, values);
  });
}

template <class Math, int kColumns>
__global__ void __launch_bounds__(kThreads, kFwdBlocks<Math, kColumns>) projection_fwd_kernel(const FwdArgs args) {
  using Element = typename Math::Element;
  using Product = Product<Math, kAlong, kAlong, kColumns>;
  CU_DYNAMIC_SHARED(shared);
  const int K = args.shape.K, column_tiles = (K + kColumns - 1) / kColumns;
  const int row_tile = static_cast<int>(blockIdx.x) / column_tiles;
  const int column = static_cast<int>(blockIdx.x) % column_tiles * kColumns, row = row_tile * kBlockRows;

  Product product;
  fwd_main_loop<Math, kColumns>(args, row, column, shared, product);
  __syncthreads();

  const Staging<kColumns, Product::kStaging> staging(shared);
  float* channels = reinterpret_cast<float*>(shared + FwdShared<Math, kColumns>::kChannels);
  product.store(staging);
  fwd_load_channels<kColumns>(args, column, channels);
  __syncthreads();
  fwd_write<Element, kColumns>(args, row, column, channels, staging);
  if (args.partials == nullptr) return;
  const int left = static_cast<int>(args.shape.rows - row), rows = left < kBlockRows ? left : kBlockRows;
  const float bias = channels[kBias * kColumns + static_cast<int>(threadIdx.x) % kColumns];
  const auto value = [&](int r, int c) { return to_float(stored<Element>(*staging.at(r, c) + bias)); };
  float* partials = args.partials + static_cast<int64_t>(row_tile) * 3 * K + column;
  column_statistics<kColumns>(value, rows, K - column, partials, K,
                              reinterpret_cast<float*>(shared + FwdShared<Math, kColumns>::kScratch));
}

} // namespace resnet_fused::cuda
