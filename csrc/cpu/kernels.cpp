// The vector kernels, compiled once per instruction set: setup.py sets RESNET_FUSED_ISA to the name
// and passes the flags. All code but `table` is in an unnamed namespace.
#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

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

#include "conv_sources.h"

#include "conv_kernels.h"

#include "winograd_filters.h"

#include "winograd_patches.h"

#include "winograd.h"

#include "winograd_weight.h"

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
    kPanelColumns<float>,
    conv_pack<float>,
    conv_fwd<float>,
    conv_dgrad<float>,
    conv_wgrad<float>,
    kMostDepth<float>,
    patch_pitch<float>,
    winograd_elements<float>,
    winograd_pack<float>,
    winograd_patches<float>,
    winograd_fwd<float>,
    winograd_dgrad<float>,
    winograd_weight_elements<float>,
    winograd_weight_patches<float>,
    winograd_wgrad<float>,
};

} // namespace

const Kernels& table() { return kTable; }

} // namespace resnet_fused::cpu::RESNET_FUSED_ISA
