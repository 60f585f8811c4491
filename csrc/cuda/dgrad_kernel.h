// dx[gathered npq, c] = sum over k of dy[npq, k] * weight[k, c], dy made from (g, y) as it is loaded. A block
// writes all of x's positions that its rows own: the gathered one, and zero at the others, plus a given tensor.
#pragma once

#include "epilogue.h"
#include "product.h"
#include "prologue.h"

namespace resnet_fused::cuda {

template <class Math, int kColumns, bool kOld = kBefore80>
struct DgradShared {
  using Element = typename Math::Element;
  static constexpr int kStages = kOld ? 1 : 2;
  static constexpr int kTableSlots = 2;
  static constexpr int kY = kAlongBytes<Element, kBlockRows>;
  static constexpr int kWeight = 2 * kY;
  static constexpr int kStageBytes = kWeight + kAcrossBytes<Element, kColumns>;
  static constexpr int kTables = kStages * kStageBytes;
  static constexpr int kTableBytes = kCoefficientRows * kDepth<Math> * 4;
  static constexpr int kLoopBytes = kTables + kTableSlots * kTableBytes, kStagingBytes = kBlockRows * kColumns * 4;
  static constexpr int kBytes = kLoopBytes > kStagingBytes ? kLoopBytes : kStagingBytes;
};

template <class Math, int kColumns, class Product>
__device__ __forceinline__ void dgrad_main_loop(const DgradArgs& args, int row, int column, unsigned char* shared,
                                                Product& product) {
  using Element = typename Math::Element;
  using Shared = DgradShared<Math, kColumns>;
  using Loader = AlongLoader<Element, kBlockRows>;
  const int C = args.shape.C, K = args.shape.K, slices = (K + kDepth<Math> - 1) / kDepth<Math>;
  const Element* g = static_cast<const Element*>(args.g);
  const Loader rows(DenseRows{static_cast<int>(args.shape.rows), K}, row);
  const auto stage_of = [&](int slice) { return shared + slice % Shared::kStages * Shared::kStageBytes; };
  const auto table_of = [&](int slice) {
    return reinterpret_cast<float*>(shared + Shared::kTables + slice % Shared::kTableSlots * Shared::kTableBytes);
  };
  const auto load_table = [&](int slice) {
    if (args.prologue == kPlain || slice >= slices) return;
    load_coefficients<kDepth<Math>>(table_of(slice), args.moments, args.sums, slice * kDepth<Math>, K, args.prologue);
  };
  // The table of a slice comes with the slice before it, so that the barrier between them makes it everyone's.
  const auto load = [&](int slice) {
    if (slice < slices) {
      const int begin = slice * kDepth<Math>;
      rows.load(stage_of(slice), g, begin, K, args.g_aligned);
      if (args.prologue == kBatchStatistics) {
        rows.load(stage_of(slice) + Shared::kY, static_cast<const Element*>(args.y), begin, K, args.g_aligned);
      }
      AcrossLoader<Element, kColumns>::load(stage_of(slice) + Shared::kWeight,
                                            static_cast<const Element*>(args.weight), DenseRows{K, C}, begin, K, column,
                                            C, args.weight_aligned);
      load_table(slice + 1);
    }
    cp_async_commit();
  };
  load_table(0);
  load(0);
#pragma unroll 1
  for (int slice = 0; slice < slices; ++slice) {
    unsigned char* stage = stage_of(slice);
    cp_async_wait<0>();
    if (args.prologue != kPlain) {
      if (slice == 0) __syncthreads();
      const auto k = Coefficients<kPerChunk<Element>>::template from<kDepth<Math>>(
          table_of(slice), Loader::own_chunk() * kPerChunk<Element>, args.prologue);
#pragma unroll
      for (int i = 0; i < Loader::kChunks; ++i) {
        unsigned char* chunk = stage + along_offset(Loader::own_row(i), Loader::own_chunk());
        apply_prologue<Element>(chunk, chunk + Shared::kY, k, args.prologue);
      }
    }
    __syncthreads();
    if constexpr (Shared::kStages > 1) load(slice + 1);
    product.multiply(stage, stage + Shared::kWeight);
    if constexpr (Shared::kStages == 1) {
      __syncthreads();
      load(slice + 1);
    }
  }
}

template <class Element, int kColumns, class Stage>
__device__ __forceinline__ void dgrad_write(const DgradArgs& args, int row, int column, const Stage& staging) {
  constexpr int kCount = kPerChunk<Element>;
  const Geometry& s = args.shape;
  for_own_chunks<Element, kColumns>([&](int block_row, int block_column) {
    const int own = column + block_column, at_row = row + block_row;
    if (own >= s.C || at_row >= s.rows) return;
    float values[kCount];
    staging.template load<kCount>(block_row, block_column, values);
    const int q = at_row % s.Q, np = at_row / s.Q, p = np % s.P, n = np / s.P;
    const int h_end = p + 1 < s.P ? (p + 1) * s.stride_h : s.H, w_end = q + 1 < s.Q ? (q + 1) * s.stride_w : s.W;
    for (int h = p * s.stride_h; h < h_end; ++h) {
      for (int w = q * s.stride_w; w < w_end; ++w) {
        const int64_t at = ((static_cast<int64_t>(n) * s.H + h) * s.W + w) * s.C + own;
        if (args.add != nullptr) {
          float add[kCount];
          load_values(static_cast<const Element*>(args.add) + at, s.C - own, args.dx_aligned, add);
#pragma unroll
          for (int i = 0; i < kCount; ++i) values[i] += add[i];
        }
        store_values(static_cast<Element*>(args.dx) + at, s.C - own, args.dx_aligned, values);
#pragma unroll
        for (int i = 0; i < kCount; ++i) values[i] = 0.f;
      }
    }
  });
}

template <class Math, int kColumns>
__global__ void __launch_bounds__(kThreads, kBackwardBlocks<Math, kColumns>)
    projection_dgrad_kernel(const DgradArgs args) {
  using Product = Product<Math, kAlong, kAcross, kColumns>;
  CU_DYNAMIC_SHARED(shared);
  const int column_tiles = (args.shape.C + kColumns - 1) / kColumns;
  const int column = static_cast<int>(blockIdx.x) % column_tiles * kColumns;
  const int row = static_cast<int>(blockIdx.x) / column_tiles * kBlockRows;

  Product product;
  dgrad_main_loop<Math, kColumns>(args, row, column, shared, product);
  __syncthreads();

  const Staging<kColumns, Product::kStaging> staging(shared);
  product.store(staging);
  __syncthreads();
  dgrad_write<typename Math::Element, kColumns>(args, row, column, staging);
}

} // namespace resnet_fused::cuda
