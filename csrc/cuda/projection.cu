// The projection shortcut on the GPU. Compiled once for each kind of arithmetic: setup.py sets
// RESNET_FUSED_MATH to the name of its namespace and RESNET_FUSED_MATH_TYPE to its class in types.h.
#include "dgrad_kernel.h"
#include "fwd_kernel.h"
#include "launch.h"
#include "wgrad_kernel.h"

namespace resnet_fused::cuda::RESNET_FUSED_MATH {
namespace {

using Math = RESNET_FUSED_MATH_TYPE;

template <class Kernel, class Args>
cudaError_t start(Kernel kernel, int64_t blocks, int shared, void* stream, const Args& args) {
  const cudaError_t error =
      cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  if (error != cudaSuccess) return error;
  const dim3 grid(static_cast<unsigned>(blocks)), block(kThreads);
  CU_LAUNCH(kernel, grid, block, shared, static_cast<cudaStream_t>(stream), args);
  return cudaGetLastError();
}

// The shared memory that code for 8.0 and newer wants or, where a device has less, what the older code wants.
template <int kColumns>
int fwd_bytes(int C, int limit) {
  const int bytes = FwdShared<Math, kColumns, false>::bytes(C);
  return bytes <= limit ? bytes : FwdShared<Math, kColumns, true>::bytes(C);
}
template <int kColumns>
int dgrad_bytes(int limit) {
  constexpr int kBytes = DgradShared<Math, kColumns, false>::kBytes;
  return kBytes <= limit ? kBytes : DgradShared<Math, kColumns, true>::kBytes;
}
template <int kColumns>
int wgrad_bytes(int limit) {
  constexpr int kBytes = WgradShared<Math, kColumns, false>::kBytes;
  return kBytes <= limit ? kBytes : WgradShared<Math, kColumns, true>::kBytes;
}

template <int kColumns>
cudaError_t fwd_as(const FwdArgs& args, int limit, void* stream) {
  const int64_t blocks = tiles_of(args.shape.rows, kBlockRows) * tiles_of(args.shape.K, kColumns);
  return start(projection_fwd_kernel<Math, kColumns>, blocks, fwd_bytes<kColumns>(args.shape.C, limit), stream, args);
}

int fwd(const FwdArgs& args, int block_columns, int shared_limit, void* stream) {
  if (args.shape.rows == 0) {
    if (args.partials == nullptr) return cudaSuccess;
    return cudaMemsetAsync(args.partials, 0, 3 * sizeof(float) * args.shape.K, static_cast<cudaStream_t>(stream));
  }
  return block_columns == 64 ? fwd_as<64>(args, shared_limit, stream) : fwd_as<128>(args, shared_limit, stream);
}

template <int kColumns>
cudaError_t dgrad_as(const DgradArgs& args, int limit, void* stream) {
  const int64_t blocks = tiles_of(args.shape.rows, kBlockRows) * tiles_of(args.shape.C, kColumns);
  return start(projection_dgrad_kernel<Math, kColumns>, blocks, dgrad_bytes<kColumns>(limit), stream, args);
}

int dgrad(const DgradArgs& args, int block_columns, int shared_limit, void* stream) {
  if (args.shape.rows == 0) return cudaSuccess;
  return block_columns == 64 ? dgrad_as<64>(args, shared_limit, stream) : dgrad_as<128>(args, shared_limit, stream);
}

template <int kColumns>
cudaError_t wgrad_as(const WgradArgs& args, int limit, void* stream) {
  const int64_t blocks = tiles_of(args.shape.K, kBlockRows) * tiles_of(args.shape.C, kColumns) * args.splits;
  return start(projection_wgrad_kernel<Math, kColumns>, blocks, wgrad_bytes<kColumns>(limit), stream, args);
}

int wgrad(const WgradArgs& args, int block_columns, int shared_limit, void* stream) {
  const cudaError_t error =
      block_columns == 64 ? wgrad_as<64>(args, shared_limit, stream) : wgrad_as<128>(args, shared_limit, stream);
  if (error != cudaSuccess || args.splits == 1) return error;
  const int64_t outputs = static_cast<int64_t>(args.shape.K) * args.shape.C + args.shape.K;
  const int64_t blocks = tiles_of(outputs, kThreads);
  return args.dw_is_float ? start(projection_wgrad_reduce_kernel<float>, blocks, 0, stream, args)
                          : start(projection_wgrad_reduce_kernel<Math::Element>, blocks, 0, stream, args);
}

template <int kColumns>
int shared_bytes_as(Operation operation, int limit) {
  if (operation == kFwd) return fwd_bytes<kColumns>(INT32_MAX / 2, limit);
  return operation == kDgrad ? dgrad_bytes<kColumns>(limit) : wgrad_bytes<kColumns>(limit);
}

int shared_bytes(Operation operation, int block_columns, int shared_limit) {
  return block_columns == 64 ? shared_bytes_as<64>(operation, shared_limit)
                             : shared_bytes_as<128>(operation, shared_limit);
}

constexpr Launchers kLaunchers = {fwd, dgrad, wgrad, shared_bytes};

} // namespace

const Launchers& launchers() { return kLaunchers; }

} // namespace resnet_fused::cuda::RESNET_FUSED_MATH
