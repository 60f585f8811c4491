"""Kernels compiled for GPUs that are not there, and what the compiler reports of them.

Triton is imported by the modules of this package, not by the package, which nothing imports at start-up.
"""
