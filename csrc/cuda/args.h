// Arguments of the projection kernels: plain data, passed by value. Tensors are dense: x (N, H, W, C),
// y and g (N, P, Q, K), weight (K, C). A pointer that is not used is null.
#pragma once

#include <cstdint>

namespace resnet_fused::cuda {

struct Geometry {
  int64_t rows; // N * P * Q, below 2^31 - 128
  int C, K;
  int H, W, P, Q;
  int stride_h, stride_w;
};

// Rows of a moments table (5, K), and of the sums (2, K).
enum MomentRow : int { kRowMean = 0, kRowRstd = 1, kRowScale = 2, kRowShift = 3, kRowInverse = 4 };

struct FwdArgs {
  Geometry shape;
  const void* x;
  const void* weight;
  const float* bias;        // (K)
  void* out;                // (N, P, Q, K)
  float* partials;          // (T, 3, K): count, mean, M2 of each 128 rows, as stored
  const float* moments;     // (5, K): the affine of the product
  const void* add;          // (N, P, Q, K): the main branch
  const float* add_moments; // (5, K): its affine
  bool relu;
  bool x_aligned, weight_aligned, out_aligned; // rows are whole chunks of 16 bytes; `out` speaks for `add` too
};

// How dy comes from g: as it is, by a factor (running statistics), or by the backward of batch statistics.
enum Prologue : int { kPlain = 0, kScaled = 1, kBatchStatistics = 2 };

struct DgradArgs {
  Geometry shape;
  const void* g;
  const void* y;
  const void* weight;
  const float* moments; // (5, K)
  const float* sums;    // (2, K)
  void* dx;             // (N, H, W, C)
  const void* add;      // (N, H, W, C)
  int prologue;
  bool g_aligned, weight_aligned, dx_aligned; // `g` speaks for `y`, `dx` for `add`
};

struct WgradArgs {
  Geometry shape;
  const void* g;
  const void* y;
  const void* x;
  const float* moments;
  const float* sums;
  float* partials;      // (splits, K, C), or null when there is one split
  float* dbias_partials; // (splits, K), or null
  void* dw;             // (K, C)
  float* dbias;         // (K), or null
  int prologue;
  int splits;
  bool dw_is_float; // else of the dtype of x
  bool g_aligned, x_aligned, dw_aligned;
};

} // namespace resnet_fused::cuda
