"""The thread-wide modes and the random generators around a symbolic trace: known before, untouched after."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Iterator
from typing import Any

import torch

_AUTOCAST_DEVICES = ("cuda", "cpu")


class UntraceableError(Exception):
    """A block that cannot be recorded; the message is the reason, in words a user can act on."""


def ambient() -> tuple[object, ...]:
    """The thread-wide modes a forward may switch and a graph does not show."""
    autocast = [(torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in _AUTOCAST_DEVICES]
    saved_tensor_hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), saved_tensor_hooks, *autocast)


def _random_states() -> dict[str, Any]:
    """The state of every generator a forward could draw from, in comparable form."""
    states: dict[str, Any] = {"torch": torch.random.get_rng_state().tolist(), "random": random.getstate()}
    if torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state().tolist()
    if "numpy.random" in sys.modules:
        kind, keys, *rest = sys.modules["numpy.random"].get_state()
        states["numpy"] = (kind, keys.tolist(), *rest)
    return states


def _restore_random_states(states: dict[str, Any]) -> None:
    torch.random.set_rng_state(torch.tensor(states["torch"], dtype=torch.uint8, device="cpu"))
    random.setstate(states["random"])
    if "cuda" in states:
        torch.cuda.set_rng_state(torch.tensor(states["cuda"], dtype=torch.uint8, device="cpu"))
    if "numpy" in states:
        sys.modules["numpy.random"].set_state(states["numpy"])


@contextlib.contextmanager
def guarded(eager_modes: bool) -> Iterator[None]:
    """Known modes around a trace, and every generator as it was; raises if a random number was drawn."""
    autocast = [torch.is_autocast_enabled(d) for d in _AUTOCAST_DEVICES]
    before = _random_states()
    try:
        for device in _AUTOCAST_DEVICES:
            torch.set_autocast_enabled(device, eager_modes)
        with torch.inference_mode(False), torch.set_grad_enabled(eager_modes):
            yield
    finally:
        for device, enabled in zip(_AUTOCAST_DEVICES, autocast, strict=True):
            torch.set_autocast_enabled(device, enabled)
        drawn = _random_states() != before
        if drawn:
            _restore_random_states(before)
    if drawn:
        raise UntraceableError("its forward draws random numbers")
