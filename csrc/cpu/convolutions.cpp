// Our own products of convolutions, compiled once per instruction set as kernels.cpp is. Where there are instructions
// for products of bfloat16 (AVX512-BF16, AMX) that dtype's alone: the others are those of the set that it extends.
#include "intrinsics.h"
#include "kernels.h"

namespace resnet_fused::cpu::RESNET_FUSED_ISA {
namespace {

#include "vec.h"

#include "rows.h"

#include "gemm_micro.h"

#include "gemm_amx.h"

#include "gemm_pack.h"

#include "gemm_pairs.h"

#include "gemm.h"

#include "projection_sources.h"

#include "projection_kernels.h"

#include "conv_sources.h"

#include "conv_kernels.h"

#include "narrow.h"

#include "narrow_weight.h"

#include "winograd_filters.h"

#include "winograd_patches.h"

#include "winograd.h"

#include "winograd_weight.h"

template <class A>
constexpr ConvKernels direct() {
  ConvKernels own;
  own.element = sizeof(Panel<A>);
  own.panel_columns = kPanelColumns<Panel<A>>;
  own.depth_step = kDepthStep<Panel<A>>;
  own.pack = conv_pack<A>;
  own.fwd = conv_fwd<A>;
  own.dgrad = conv_dgrad<A>;
  own.wgrad = conv_wgrad<A>;
  return own;
}

#if defined(__AVX512BF16__)
constexpr ConvKernels kOwn[kDTypes] = {{}, direct<BFloat16>(), {}, {}};
#else
template <class A>
constexpr ConvKernels with_winograd() {
  ConvKernels own = direct<A>();
  own.deepest = kMostDepth<Opmath<A>>;
  own.patch_pitch = patch_pitch<Opmath<A>>;
  own.winograd_elements = winograd_elements<A>;
  own.winograd_pack = winograd_pack<A>;
  own.winograd_patches = winograd_patches<A>;
  own.winograd_fwd = winograd_fwd<A>;
  own.winograd_dgrad = winograd_dgrad<A>;
  own.winograd_weight_elements = winograd_weight_elements<A>;
  own.winograd_weight_patches = winograd_weight_patches<A>;
  own.winograd_wgrad = winograd_wgrad<A>;
  if (kVectorBytes == 64) {
    own.narrow_fwd = narrow_fwd<A>;
    own.narrow_dgrad = narrow_dgrad<A>;
    own.narrow_weight_elements = narrow_weight_elements<A>;
    own.narrow_wgrad = narrow_wgrad<A>;
  }
  return own;
}

constexpr ConvKernels kOwn[kDTypes] = {with_winograd<float>(), with_winograd<BFloat16>(), {}, {}};
#endif

} // namespace

const ConvKernels* convolutions() { return kOwn; }

} // namespace resnet_fused::cpu::RESNET_FUSED_ISA
