"""Proving Triton GPU kernels without a GPU, in three layers.

1. `interpreter`: the Triton interpreter, repaired (bf16) and instrumented (bounds, races, bytes moved). It proves the
   algorithm, its masks and its strides; it says nothing about code generation. Needs a process of its own (`runner`).
2. `resnet_fused.compiling.offline`: every kernel that host code launches, compiled for each target. It proves that the
   kernel compiles and counts registers, spills, shared memory and instructions; it says nothing about results or speed.
3. `launch` and `ptx`: the compiled PTX of sm_80 and sm_90, executed on CPU tensors. It proves the compiled code,
   with shared-memory races, missing waits and misalignment; TMA, mbarrier and tcgen05 are refused, and neither
   caches nor the relaxed memory model are modelled.

None of the three was compared with a GPU. Nothing here measures time.
"""
