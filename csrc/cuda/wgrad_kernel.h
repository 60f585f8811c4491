// dw[k, c] = sum over npq of dy[npq, k] * x[gathered npq, c], dy made from (g, y) as it is loaded, and beside it
// dbias[k] = sum over npq of dy[npq, k]. The rows are split among blocks; the parts are added in their order.
#pragma once

#include "epilogue.h"
#include "product.h"
#include "prologue.h"

namespace resnet_fused::cuda {

template <class Math, int kColumns, bool kOld = kBefore80>
struct WgradShared {
  using Element = typename Math::Element;
  static constexpr int kStages = kOld ? 1 : 2;
  static constexpr int kY = kAcrossBytes<Element, kBlockRows>;
  static constexpr int kX = 2 * kY;
  static constexpr int kStageBytes = kX + kAcrossBytes<Element, kColumns>;
  static constexpr int kLoopBytes = kStages * kStageBytes, kStagingBytes = kBlockRows * kColumns * 4;
  static constexpr int kTable = kLoopBytes > kStagingBytes ? kLoopBytes : kStagingBytes; // behind both
  static constexpr int kBytes = kTable + kCoefficientRows * kBlockRows * 4;
};

// The slices [begin, end) of the reduction that are one split's.
struct Split {
  int begin, end;

  __device__ __forceinline__ Split(int64_t slices, int index, int splits)
      : begin(static_cast<int>(slices * index / splits)), end(static_cast<int>(slices * (index + 1) / splits)) {}
};

// Half of the steps of one slice of dy, summed at one of the block's channels.
template <class Math>
__device__ __forceinline__ float channel_sum(const unsigned char* tile) {
  using Element = typename Math::Element;
  constexpr int kSteps = kDepth<Math> / 2;
  const int channel = static_cast<int>(threadIdx.x) % kBlockRows;
  const int first = static_cast<int>(threadIdx.x) / kBlockRows * kSteps;
  const int chunk = channel / kPerChunk<Element>, within = channel % kPerChunk<Element>;
  float sum = 0.f;
#pragma unroll 8
  for (int i = 0; i < kSteps; ++i) {
    const unsigned char* at = tile + across_offset<Element, kBlockRows>(first + i, chunk);
    sum += to_float(reinterpret_cast<const Element*>(at)[within]);
  }
  return sum;
}

// Returns this thread's part of the channel sums, if they are wanted.
template <class Math, int kColumns, class Product>
__device__ __forceinline__ float wgrad_main_loop(const WgradArgs& args, const Split& split, int channel, int column,
                                                 bool want_sums, unsigned char* shared, Product& product) {
  using Element = typename Math::Element;
  using Shared = WgradShared<Math, kColumns>;
  using Loader = AcrossLoader<Element, kBlockRows>;
  const int C = args.shape.C, K = args.shape.K, rows = static_cast<int>(args.shape.rows);
  const DenseRows dense{rows, K};
  const GatheredRows gathered{args.shape};
  float* table = reinterpret_cast<float*>(shared + Shared::kTable);
  const auto stage_of = [&](int slice) {
    return shared + (slice - split.begin) % Shared::kStages * Shared::kStageBytes;
  };
  const auto load = [&](int slice) {
    if (slice < split.end) {
      const int step = slice * kDepth<Math>;
      unsigned char* stage = stage_of(slice);
      Loader::load(stage, static_cast<const Element*>(args.g), dense, step, rows, channel, K, args.g_aligned);
      if (args.prologue == kBatchStatistics) {
        Loader::load(stage + Shared::kY, static_cast<const Element*>(args.y), dense, step, rows, channel, K,
                     args.g_aligned);
      }
      AcrossLoader<Element, kColumns>::load(stage + Shared::kX, static_cast<const Element*>(args.x), gathered, step,
                                            rows, column, C, args.x_aligned);
    }
    cp_async_commit();
  };
  if (args.prologue != kPlain) {
    load_coefficients<kBlockRows>(table, args.moments, args.sums, channel, K, args.prologue);
  }
  load(split.begin);
  float sum = 0.f;
#pragma unroll 1
  for (int slice = split.begin; slice < split.end; ++slice) {
    unsigned char* stage = stage_of(slice);
    cp_async_wait<0>();
    if (args.prologue != kPlain) {
      if (slice == split.begin) __syncthreads();
      const auto k = Coefficients<kPerChunk<Element>>::template from<kBlockRows>(
          table, Loader::own_chunk() * kPerChunk<Element>, args.prologue);
#pragma unroll
      for (int i = 0; i < Loader::kChunks; ++i) {
        // Beyond the last row g is zero and must stay so: the affine would give the sums a constant.
        if (slice * kDepth<Math> + Loader::own_row(i) >= rows) continue;
        unsigned char* chunk = stage + across_offset<Element, kBlockRows>(Loader::own_row(i), Loader::own_chunk());
        apply_prologue<Element>(chunk, chunk + Shared::kY, k, args.prologue);
      }
    }
    __syncthreads();
    if constexpr (Shared::kStages > 1) load(slice + 1);
    product.multiply(stage, stage + Shared::kX);
    if (want_sums) sum += channel_sum<Math>(stage);
    if constexpr (Shared::kStages == 1) {
      __syncthreads();
      load(slice + 1);
    }
  }
  return sum;
}

// The block's product to `target` (K, C), float32 or the element type.
template <class Target, int kColumns, class Stage>
__device__ __forceinline__ void wgrad_write(Target* target, const Geometry& s, int channel, int column, bool aligned,
                                            const Stage& staging) {
  constexpr int kCount = kPerChunk<Target>;
  for_own_chunks<Target, kColumns>([&](int block_row, int block_column) {
    const int row = channel + block_row, own = column + block_column;
    if (row >= s.K || own >= s.C) return;
    float values[kCount];
    staging.template load<kCount>(block_row, block_column, values);
    store_values(target + static_cast<int64_t>(row) * s.C + own, s.C - own, aligned, values);
  });
}

template <class Math, int kColumns>
__global__ void __launch_bounds__(kThreads, kBackwardBlocks<Math, kColumns>)
    projection_wgrad_kernel(const WgradArgs args) {
  using Element = typename Math::Element;
  using Product = Product<Math, kAcross, kAcross, kColumns>;
  CU_DYNAMIC_SHARED(shared);
  const Geometry& s = args.shape;
  const int column_tiles = (s.C + kColumns - 1) / kColumns, channel_tiles = (s.K + kBlockRows - 1) / kBlockRows;
  const int tile = static_cast<int>(blockIdx.x);
  const int column = tile % column_tiles * kColumns, channel = tile / column_tiles % channel_tiles * kBlockRows;
  const int part = tile / column_tiles / channel_tiles;
  const Split split((s.rows + kDepth<Math> - 1) / kDepth<Math>, part, args.splits);
  float* dbias = args.splits > 1 ? args.dbias_partials + static_cast<int64_t>(part) * s.K : args.dbias;
  const bool want_sums = args.dbias != nullptr && column == 0;

  Product product;
  const float sum = wgrad_main_loop<Math, kColumns>(args, split, channel, column, want_sums, shared, product);
  __syncthreads();

  const Staging<kColumns, Product::kStaging> staging(shared);
  product.store(staging);
  float* halves = reinterpret_cast<float*>(shared + WgradShared<Math, kColumns>::kTable);
  halves[threadIdx.x] = sum;
  __syncthreads();
  if (args.splits > 1) {
    float* target = args.partials + static_cast<int64_t>(part) * s.K * s.C;
    wgrad_write<float, kColumns>(target, s, channel, column, s.C % kPerChunk<float> == 0, staging);
  } else if (args.dw_is_float) {
    wgrad_write<float, kColumns>(static_cast<float*>(args.dw), s, channel, column, args.dw_aligned, staging);
  } else {
    wgrad_write<Element, kColumns>(static_cast<Element*>(args.dw), s, channel, column, args.dw_aligned, staging);
  }
  const int own = static_cast<int>(threadIdx.x);
  if (want_sums && own < kBlockRows && channel + own < s.K) {
    dbias[channel + own] = halves[own] + halves[own + kBlockRows];
  }
}

// Adds the parts of dw, and of dbias, in their order.
template <class Target>
__global__ void projection_wgrad_reduce_kernel(const WgradArgs args) {
  const int64_t weights = static_cast<int64_t>(args.shape.K) * args.shape.C;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const bool bias = i >= weights;
  if (i >= weights + (args.dbias != nullptr ? args.shape.K : 0)) return;
  const float* part = bias ? args.dbias_partials + (i - weights) : args.partials + i;
  const int64_t pitch = bias ? args.shape.K : weights;
  float sum = 0.f;
#pragma unroll 4
  for (int s = 0; s < args.splits; ++s) sum += part[s * pitch];
  if (bias) {
    args.dbias[i - weights] = sum;
  } else {
    from_float(sum, static_cast<Target*>(args.dw) + i);
  }
}

} // namespace resnet_fused::cuda
