// What the host code asks of the CUDA runtime; apart from it, so that the ops need none of CUDA's headers.
#pragma once

#include "plan.h"

namespace resnet_fused::cuda {

// No multiprocessors, and the shared memory of 8.0, if the runtime does not say.
Device describe(int device);

const char* error_text(int error);

} // namespace resnet_fused::cuda
