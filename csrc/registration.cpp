// Schemas of the primitives: the names and argument order of resnet_fused/reference.py and, with allow_tf32 behind
// them, of reference_projection.py. Pure, but for bn_finalize, which moves the running buffers. Fake kernels are
// registered in Python.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(resnet_fused, m) {
  m.def("bn_stats(Tensor y) -> Tensor");
  m.def(
      "bn_finalize(Tensor partials, Tensor? weight, Tensor? bias, Tensor? conv_bias, Tensor(a!)? running_mean, "
      "Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, float? momentum, float eps) -> Tensor");
  m.def(
      "bn_eval_moments(Tensor running_mean, Tensor running_var, Tensor? weight, Tensor? bias, Tensor? conv_bias, "
      "float eps, ScalarType dtype) -> Tensor");
  m.def(
      "bn_apply(Tensor y, Tensor moments, Tensor? residual, Tensor? residual_moments, int residual_stride, "
      "int channel_offset, bool relu) -> Tensor");
  m.def("bn_bwd_reduce(Tensor dout, Tensor y, Tensor moments, bool relu) -> Tensor");
  m.def("bn_bwd_reduce_rebuild(Tensor dout, Tensor y, Tensor moments, bool relu) -> (Tensor, Tensor)");
  m.def(
      "join_bwd_reduce(Tensor dout, Tensor? dskip, Tensor? out, Tensor y, Tensor moments, Tensor? residual_y, "
      "Tensor? residual_moments) -> (Tensor, Tensor, Tensor)");
  m.def("bn_bwd_finalize(Tensor sums, Tensor moments, bool training) -> Tensor");
  m.def("bn_bwd_apply(Tensor g, Tensor y, Tensor moments, Tensor coef, bool relu) -> Tensor");
  m.def(
      "pool_apply(Tensor y, Tensor moments, int[2] kernel, int[2] stride, int[2] padding, bool relu) -> Tensor");
  m.def(
      "pool_bwd(Tensor dout, Tensor y, Tensor moments, int[2] kernel, int[2] stride, int[2] padding, bool relu) "
      "-> (Tensor, Tensor)");
  m.def(
      "projection_fwd(Tensor x, Tensor weight, Tensor? bias, int[2] stride, bool stats, Tensor? moments, Tensor? add, "
      "Tensor? add_moments, bool relu, bool allow_tf32) -> (Tensor, Tensor)");
  m.def(
      "projection_dgrad(Tensor g, Tensor? y, Tensor weight, Tensor? moments, Tensor? sums, int[2] size, int[2] stride, "
      "Tensor? add, bool allow_tf32) -> Tensor");
  m.def(
      "projection_wgrad(Tensor g, Tensor? y, Tensor x, Tensor? moments, Tensor? sums, int[2] stride, ScalarType dtype, "
      "bool bias, bool allow_tf32) -> (Tensor, Tensor)");
  m.def("cpu_isa() -> str");
  m.def("set_cpu_isa(str name) -> ()");
  m.def("release_memory() -> int");
  m.def("keep_memory(bool on) -> bool");
}
