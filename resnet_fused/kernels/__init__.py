"""Triton kernels and their launchers: no autograd, no modules, and nothing touches a device at import.

Activations are channels_last; a launcher allocates its outputs, picks its tile with `tiles` and starts
kernels through `launch.launch`. Triton itself is imported here and nowhere else in the package.
"""
