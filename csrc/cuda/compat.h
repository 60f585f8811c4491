// The dialect the kernels are written in: CUDA C++ without the launch syntax and without its headers for
// half types, so that an ordinary C++ compiler can build the same sources against an emulated device.
#pragma once

#include <cstdint>

namespace resnet_fused::cuda {

// Whether this is code for a device before compute capability 8.0 (sm_75). It has no asynchronous copies and half
// the shared memory, and its tensor cores know nothing but float16: bfloat16 and TF32 products are float32 ones.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr bool kBefore80 = true;
#else
constexpr bool kBefore80 = false;
#endif

} // namespace resnet_fused::cuda

#if defined(__CUDACC__)

#include <cuda_runtime.h>

#define CU_LAUNCH(kernel, grid, block, shared, stream, ...) kernel<<<grid, block, shared, stream>>>(__VA_ARGS__)
#define CU_DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]

#else

#include "device_shim.h"

#endif
