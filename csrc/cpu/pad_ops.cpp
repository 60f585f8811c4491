// The gradient of option A's shortcut, which takes every so many pixels and pads channels with zeros.
#include <torch/csrc/stable/library.h>

#include <cstring>

#include "host.h"

namespace resnet_fused::cpu {
namespace {

// (N, C, H, W) like `x`: channels [first, first + C) of `g` at every `stride`-th pixel, zero elsewhere. Written once.
Tensor pad_bwd(const Tensor& g_any, const Tensor& x, int64_t stride, int64_t first) {
  const Checker check("pad_bwd");
  check.activation("g", g_any);
  check.device("x", x);
  check.dtype("x", x, g_any.scalar_type());
  check.require(x.dim() == 4, "x", "4 dimensions", x.dim());
  check.require(stride >= 1, "stride", "at least 1", stride);
  const int64_t N = x.size(0), C = x.size(1), H = x.size(2), W = x.size(3);
  const int64_t K = g_any.size(1), P = (H + stride - 1) / stride, Q = (W + stride - 1) / stride;
  check.require(first >= 0 && first + C <= K, "first", "channels that g has", first);
  check.shape("g", g_any, {N, K, P, Q});
  const Tensor g = dense(g_any), dx = empty_channels_last(N, C, H, W, g.scalar_type());
  const auto element = static_cast<int64_t>(g.element_size()), own = C * element;
  const char* from = static_cast<const char*>(g.const_data_ptr()) + first * element;
  char* to = static_cast<char*>(dx.mutable_data_ptr());
  for_parts(parts_of(N * H, dx.numel()), N * H, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      char* out = to + row * W * own;
      std::memset(out, 0, W * own);
      if (row % H % stride != 0) continue;
      const char* in = from + (row / H * P + row % H / stride) * Q * K * element;
      for (int64_t q = 0; q < Q; ++q) std::memcpy(out + q * stride * own, in + q * K * element, own);
    }
  });
  return dx;
}

} // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(resnet_fused, m) { m.def("pad_bwd(Tensor g, Tensor x, int stride, int first) -> Tensor"); }

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CPU, m) { m.impl("pad_bwd", TORCH_BOX(&pad_bwd)); }

} // namespace resnet_fused::cpu
