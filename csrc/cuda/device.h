// What the host code asks of the CUDA runtime; apart from it, so that the ops need none of CUDA's headers.
#pragma once

namespace resnet_fused::cuda {

// Multiprocessors of a device; 0 if the runtime does not say.
int multiprocessors(int device);

const char* error_text(int error);

} // namespace resnet_fused::cuda
