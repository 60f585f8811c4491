// The launchers of one kind of arithmetic. They start kernels on the current device and the given stream,
// allocate nothing and wait for nothing; each returns a cudaError_t, 0 when all went well.
#pragma once

#include "plan.h"

namespace resnet_fused::cuda {

enum Operation : int { kFwd = 0, kDgrad = 1, kWgrad = 2 };

struct Launchers {
  // `shared_limit` is the shared memory that the device gives a block.
  int (*fwd)(const FwdArgs& args, int block_columns, int shared_limit, void* stream);
  int (*dgrad)(const DgradArgs& args, int block_columns, int shared_limit, void* stream);
  // Two kernels where there is more than one split.
  int (*wgrad)(const WgradArgs& args, int block_columns, int shared_limit, void* stream);
  // The most shared memory that a block of the kernel asks for.
  int (*shared_bytes)(Operation operation, int block_columns, int shared_limit);
};

namespace bf16 {
const Launchers& launchers();
}
namespace f16 {
const Launchers& launchers();
}
namespace tf32 {
const Launchers& launchers();
}
namespace f32 {
const Launchers& launchers();
}

} // namespace resnet_fused::cuda
