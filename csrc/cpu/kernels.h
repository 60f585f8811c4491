// The interface between the host code and the vector kernels.
//
// kernels.cpp is compiled once per instruction set, each time into a namespace of its own, and hands
// out one table of function pointers. Nothing here includes a standard header with inline functions:
// such a function compiled with wide instructions could be the copy that the linker keeps for all.
//
// A channels_last activation is a matrix of N*H*W rows and C columns, stored row by row. The kernels
// see it as rows of `width` elements, a multiple of C (see tiling.h), so that a narrow C still fills
// a vector; per-channel constants are tiled to `width`.
#pragma once

#include <cstdint>

namespace resnet_fused::cpu {

enum DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat64 = 3, kDTypes = 4 };

enum Shortcut : int { kNoShortcut = 0, kPlainShortcut = 1, kProjectionShortcut = 2 };

// Operands of the batch norm kernels; a pointer that a kernel does not use is null.
struct BnArgs {
  const void* y = nullptr;         // raw convolution output
  const void* grad = nullptr;      // gradient of act(z), or of z where it is already masked
  const void* skip = nullptr;      // second gradient to add
  const void* out = nullptr;       // stored output whose sign is the mask
  const void* residual = nullptr;  // shortcut, or a projection's raw output
  void* result = nullptr;          // the activation-sized tensor that is written
  const void* constants = nullptr; // planes of `plane` per-column values, in opmath
  int64_t plane = 0;               // width, rounded up to whole vectors
  int64_t width = 0;
  int shortcut = kNoShortcut;
  bool relu = false;
  bool training = true;            // batch statistics: y has a part in dy
};

// Planes of BnArgs::constants: the affine of y, then a second affine or the backward coefficients.
enum Plane : int { kMean = 0, kScale = 1, kShift = 2, kSecond = 3, kPlanes = 6 };

// Elements [begin, end) with begin a multiple of width; acc: planes of `plane` doubles, zeroed by the
// caller: (mean - origin, M2, origin) for stats, (sum g, sum g*(y-mean) [, sum g*(residual-mean)]) for
// reductions.
using BnKernel = void (*)(const BnArgs&, int64_t begin, int64_t end, double* acc);

struct PoolArgs {
  const void* y = nullptr;
  const void* grad = nullptr;      // gradient of the pool's output
  void* result = nullptr;
  const void* constants = nullptr; // planes kMean, kScale, kShift
  int64_t plane = 0;
  int64_t channels = 0;
  int64_t in[2] = {0, 0};          // H, W
  int64_t pooled[2] = {0, 0};      // P, Q
  int64_t kernel[2] = {0, 0};
  int64_t stride[2] = {0, 0};
  int64_t padding[2] = {0, 0};
  int64_t slots = 0;               // pooled rows whose arg-max is held at once
  bool relu = false;
};

// Rows [begin, end) of the flattened (N, P) for the forward, (N, H) for the backward.
using PoolKernel = void (*)(const PoolArgs&, int64_t begin, int64_t end);
// indices: slots * Q * plane opmath-sized integers; held: slots row numbers, -1 where empty.
using PoolBwdKernel =
    void (*)(const PoolArgs&, int64_t begin, int64_t end, double* acc, void* indices, int64_t* held);

// How dy comes from g: as it is, by a factor (running statistics), or by the backward of batch statistics.
enum Prologue : int { kPlain = 0, kScaled = 1, kBatchStatistics = 2 };

// Operands of the projection's kernels.
struct ProjectionArgs {
  const void* x = nullptr;
  const void* weight = nullptr;    // (K, C)
  const void* g = nullptr;
  const void* y = nullptr;
  const void* add = nullptr;       // laid out as result
  void* result = nullptr;
  void* partials = nullptr;        // (tiles, 3, K) in opmath, or null
  const void* constants = nullptr; // planes of `plane` per-channel values of K, in opmath
  int64_t plane = 0;
  int64_t batch = 0;
  int64_t channels = 0;            // C
  int64_t outputs = 0;             // K
  int64_t in[2] = {1, 1};          // H, W
  int64_t out[2] = {1, 1};         // P, Q
  int64_t stride[2] = {1, 1};
  int prologue = kPlain;
  bool plain = false;              // the product itself is stored
  bool has_affine = false;
  bool has_add_affine = false;
  bool relu = false;
  bool streamed = false;           // result is stored past the caches
  int64_t tile_rows = 128;         // of a tile of statistics
  // Mean and M2 of one channel of `rows` rows, `pitch` elements apart, one of whose values is not finite.
  void (*plain_moments)(DType, const void*, int64_t rows, int64_t pitch, double* mean, double* m2) = nullptr;
};

// What one call computes: rows of the flattened (N, P, Q) times channels of the result's first matrix dimension.
struct ProjectionTask {
  int64_t rows[2] = {0, 0};
  int64_t channels[2] = {0, 0};    // of K, dgrad: of C
  void* result = nullptr;          // wgrad: (K, C) in opmath, the channels of it are written
  double* sums = nullptr;          // wgrad: `plane` doubles for the sums of dy, or null
  void* workspace = nullptr;       // kWorkspaceBytes, aligned to a cache line
  void* band = nullptr;            // convolution: memory for the images of a band, and where its points begin there
  int32_t* offsets = nullptr;
  void* patches = nullptr;         // Winograd: winograd_elements of opmath
  bool* unfinished = nullptr;      // set where a result is not finite
};
constexpr int64_t kWorkspaceBytes = 1984 * 1024;
constexpr int64_t kMostPatches = 128; // of Winograd's that are transformed together, in whole rows, one at least
constexpr int64_t kTileRows = 128; // of a tile of statistics
constexpr int64_t kPictureChannels = 3;

// Planes of ProjectionArgs::constants: of the epilogue, and of the prologue.
enum ProjectionPlane : int { kBias, kOwnMean, kOwnScale, kOwnShift, kAddMean, kAddScale, kAddShift, kEpiloguePlanes };
enum GradientPlane : int { kFactorG, kFactorY, kMeanY, kConstant, kProloguePlanes };

// How an element of an image is made: as it is, act(z(y)), or dy of grad and y.
enum ImageKind : int { kRaw, kNormalised, kGradient };

// A convolution of images (batch, in, channels) by filters over a grid (batch, out), one row of the result for each
// point: its patch begins at point * stride - before. The forward is one; so is dgrad, of the gradient by the mirrored
// filters, once for each remainder of a position by the stride.
struct ConvArgs {
  BnArgs image;                    // y, grad, constants, relu, training
  int kind = kRaw;
  int64_t batch = 0;
  int64_t channels = 0;            // of the images
  int64_t outputs = 0;             // of the result
  int64_t in[2] = {1, 1};
  int64_t out[2] = {1, 1};
  int64_t filter[2] = {1, 1};
  int64_t stride[2] = {1, 1};
  int64_t before[2] = {0, 0};
  int64_t band = 0;                // points whose images are copied at once; 0: a 1x1, read where they are
  const void* weight = nullptr;    // (K, taps, C)
  void* packed = nullptr;          // the filters in panels, whole ones
  void* patches = nullptr;         // Winograd: of all images, transformed, or null where each task transforms its own
  bool is_mirrored = false;        // dgrad
  int64_t taps[2] = {1, 1};
  int64_t first_tap[2] = {0, 0};   // dgrad: the filter's position i is tap first_tap - i * tap_step of the weight
  int64_t tap_step[2] = {1, 1};
  ProjectionArgs store;            // fwd: what is written and how
  BnArgs back;                     // dgrad: skip, out, y, residual, result, constants, relu
  bool streamed = false;
  int64_t grid[2] = {1, 1};        // dgrad: point (i, j) is position i * grid_step + grid_start of (batch, grid)
  int64_t grid_step[2] = {1, 1};
  int64_t grid_start[2] = {0, 0};
  BnArgs gradient;                 // wgrad: dy, of `outputs` channels
  void* gradients = nullptr;       // its patches of dy, beside `patches`, in chunks of rows of them
  void* products = nullptr;        // the sums of all chunks before, or null if there is one
  int64_t chunk[2] = {0, 0};
  int gradient_kind = kRaw;
};

// fwd: rows in whole tiles of statistics, where they are wanted.
using ProjectionKernel = void (*)(const ProjectionArgs&, const ProjectionTask&);

using ConvPack = void (*)(const ConvArgs&, int64_t begin, int64_t end); // panels
using WinogradPack = void (*)(const ConvArgs&, int64_t begin, int64_t end, void* workspace);
using ConvKernel = void (*)(const ConvArgs&, const ProjectionTask&);

// Our own products of one dtype.
struct ConvKernels {
  int64_t element = 0;             // bytes of a packed one; 0: there are no products of this dtype
  int64_t panel_columns = 0;
  int64_t depth_step = 1;          // the depth of a product is padded to a multiple of it
  ConvPack pack = nullptr;
  ConvKernel fwd = nullptr;
  ConvKernel dgrad = nullptr;
  ConvKernel wgrad = nullptr;
  int64_t deepest = 0;             // channels that Winograd's products take; 0: there are none
  int64_t (*patch_pitch)(const ConvArgs&) = nullptr; // elements of each of the 16 of a patch
  int64_t (*winograd_elements)(const ConvArgs&) = nullptr;
  WinogradPack winograd_pack = nullptr;
  ConvKernel winograd_patches = nullptr; // rows: of patches
  ConvKernel winograd_fwd = nullptr;
  ConvKernel winograd_dgrad = nullptr;
  int64_t (*winograd_weight_elements)(const ConvArgs&) = nullptr;
  ConvKernel winograd_weight_patches = nullptr; // rows: of patches, as for the next
  ConvKernel winograd_wgrad = nullptr;
  ConvKernel narrow_fwd = nullptr; // null: there are none, as of the next
  ConvKernel narrow_dgrad = nullptr;
  int64_t (*narrow_weight_elements)(const ConvArgs&) = nullptr;
  ConvKernel narrow_wgrad = nullptr;     // rows: of the flattened (N, P)
};

struct Kernels {
  const char* isa;
  int64_t vector_bytes;
  BnKernel stats[kDTypes];
  BnKernel apply[kDTypes];
  BnKernel bwd_reduce[kDTypes];
  BnKernel join_bwd_reduce[kDTypes];
  BnKernel bwd_apply[kDTypes];
  PoolKernel pool_apply[kDTypes];
  PoolBwdKernel pool_bwd[kDTypes];
  ProjectionKernel projection_fwd[kDTypes];
  ProjectionKernel projection_dgrad[kDTypes];
  ProjectionKernel projection_wgrad[kDTypes];
  const ConvKernels* convolution = nullptr; // one for each dtype
};

namespace baseline {
const Kernels& table();
const ConvKernels* convolutions();
} // namespace baseline
#if defined(__x86_64__)
namespace avx2 {
const Kernels& table();
const ConvKernels* convolutions();
} // namespace avx2
namespace avx512 {
const Kernels& table();
const ConvKernels* convolutions();
} // namespace avx512
namespace avx512_bf16 {
const ConvKernels* convolutions(); // of bfloat16
}
namespace amx {
const ConvKernels* convolutions(); // of bfloat16
}
#endif

} // namespace resnet_fused::cpu
