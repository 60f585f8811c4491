#include "device.h"

#include <cuda_runtime.h>

namespace resnet_fused::cuda {

Device describe(int device) {
  const auto ask = [&](cudaDeviceAttr attribute, int otherwise) {
    int value = 0;
    return cudaDeviceGetAttribute(&value, attribute, device) == cudaSuccess ? value : otherwise;
  };
  return {ask(cudaDevAttrMultiProcessorCount, 0), ask(cudaDevAttrMaxSharedMemoryPerBlockOptin, kWideShared)};
}

const char* error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

} // namespace resnet_fused::cuda

// The oldest compute capability that this library has code for, times 10; Python asks for it by ctypes.
extern "C" __attribute__((visibility("default"))) int resnet_fused_oldest_arch() {
  constexpr int archs[] = {__CUDA_ARCH_LIST__};
  int oldest = archs[0];
  for (const int arch : archs) oldest = arch < oldest ? arch : oldest;
  return oldest / 10;
}
