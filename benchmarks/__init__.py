"""Timings of fused nets against eager PyTorch and `torch.compile`, taken in turns in one process."""
