// The dialect the kernels are written in: CUDA C++ without the launch syntax and without its headers for
// half types, so that an ordinary C++ compiler can build the same sources against an emulated device.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)

#include <cuda_runtime.h>

#define CU_LAUNCH(kernel, grid, block, shared, stream, ...) kernel<<<grid, block, shared, stream>>>(__VA_ARGS__)
#define CU_DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]

#else

#include "device_shim.h"

#endif
