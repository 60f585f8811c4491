"""Timings of fused networks against others: taken in turns, with their spread, after a proof that ours is right.

`session` runs it all for `resnet-fused bench`; the parts serve the suite in ``benchmarks`` as well.
"""
