"""Memory of one step: the most that stood at once above what was there before it, and what it keeps for backward."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import NamedTuple

import torch

from ..engines import cpu
from ..train.memory import Kept
from .contest import Contestant


class Memory(NamedTuple):
    """Bytes of one step.

    Args:
        peak: the most that is allocated at once in the step, above parameters, buffers, optimizer state and
            input: activations, gradients, temporaries. What a library allocates behind torch's back is not seen.
            None on a CPU whose torch was built without its profiler.
        kept: what the forward keeps for the backward.
    """

    peak: int | None
    kept: int


def measure(contestant: Contestant) -> Memory:
    """Run one step of a contestant that is warm, and count."""
    contestant.release()
    device = next(contestant.model.parameters()).device
    kept = Kept(contestant.given())
    # Around the forward alone: what a backward recomputes for itself is not kept for it.
    before, contestant.watch = contestant.watch, kept.hooks()
    try:
        peak = _peak_of_gpu(contestant.run, device) if device.type == "cuda" else _peak_of_cpu(contestant.run)
    finally:
        contestant.watch = before
    return Memory(peak, kept.total())


def _peak_of_gpu(run: Callable[[], object], device: torch.device) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _peak_of_cpu(run: Callable[[], object]) -> int | None:
    """By torch's own records of every allocation and release."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler greets on stderr
    from torch.profiler import ProfilerActivity, kineto_available, profile

    if not kineto_available():
        run()
        return None
    with (
        cpu.unkept_memory(),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler,
    ):
        run()
    results = profiler.profiler.kineto_results
    records = [event for event in results.events() if event.name() == "[memory]"]
    standing = peak = 0
    for record in sorted(records, key=lambda event: event.start_ns()):
        standing += record.nbytes()
        peak = max(peak, standing)
    return peak
