// The vector kernels of batch norm, pooling and projections, compiled once per instruction set: setup.py sets RESNET_FUSED_ISA to the name
// and passes the flags. All code but `table` is in an unnamed namespace.
#include "intrinsics.h"
#include "kernels.h"

#define RESNET_FUSED_QUOTE_(x) #x
#define RESNET_FUSED_QUOTE(x) RESNET_FUSED_QUOTE_(x)

namespace resnet_fused::cpu::RESNET_FUSED_ISA {
namespace {

#include "vec.h"

#include "rows.h"

#include "bn_kernels.h"

#include "pool_kernels.h"

#include "gemm_micro.h"

#include "gemm_pack.h"

#include "gemm.h"

#include "projection_sources.h"

#include "projection_kernels.h"

// In the order of DType.
#define RESNET_FUSED_EACH_DTYPE(kernel) \
  { kernel<float>, kernel<BFloat16>, kernel<Float16>, kernel<double> }

constexpr Kernels kTable = {
    RESNET_FUSED_QUOTE(RESNET_FUSED_ISA),
    kVectorBytes,
    RESNET_FUSED_EACH_DTYPE(stats),
    RESNET_FUSED_EACH_DTYPE(apply),
    RESNET_FUSED_EACH_DTYPE(bwd_reduce),
    RESNET_FUSED_EACH_DTYPE(join_bwd_reduce),
    RESNET_FUSED_EACH_DTYPE(bwd_apply),
    RESNET_FUSED_EACH_DTYPE(pool_apply),
    RESNET_FUSED_EACH_DTYPE(pool_bwd),
    RESNET_FUSED_EACH_DTYPE(projection_fwd),
    RESNET_FUSED_EACH_DTYPE(projection_dgrad),
    RESNET_FUSED_EACH_DTYPE(projection_wgrad),
};

} // namespace

const Kernels& table() { return kTable; }

} // namespace resnet_fused::cpu::RESNET_FUSED_ISA
