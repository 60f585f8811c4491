#include "device.h"

#include <cuda_runtime.h>

namespace resnet_fused::cuda {

int multiprocessors(int device) {
  int count = 0;
  return cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) == cudaSuccess ? count : 0;
}

const char* error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

} // namespace resnet_fused::cuda
