// The kernel table of the instruction set in use.
#pragma once

#include <string>

#include "kernels.h"

namespace resnet_fused::cpu {

// The best the machine supports, or what RESNET_FUSED_CPU_ISA names, chosen at the first call.
// Raises std::runtime_error if that name is unknown or the machine lacks it.
const Kernels& kernels();

// Uses `name` from now on; for tests. Raises as `kernels` does.
void set_isa(const std::string& name);

} // namespace resnet_fused::cpu
