"""The others: eager PyTorch in both memory formats, `torch.compile` in its modes, and two libraries."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable

import torch
from torch import Tensor, nn

from . import rivals


@dataclasses.dataclass(frozen=True)
class Setting:
    """Where and in what a network is timed; ``amp``: the dtype of autocast, or None."""

    device: torch.device
    dtype: torch.dtype
    amp: torch.dtype | None = None

    @property
    def kind(self) -> torch.dtype:
        """What convolutions run in."""
        return self.amp or self.dtype


@dataclasses.dataclass(frozen=True)
class Baseline:
    """A way to run a stock network.

    Args:
        label: for tables and plots.
        build: makes it of a network that is its own to change, already in its memory format.
        obstacle: why it cannot be asked for in a setting, or None; nothing is measured to find out.
        channels_last: the memory format.
    """

    label: str
    build: Callable[[nn.Module], nn.Module]
    obstacle: Callable[[Setting], str | None] = lambda setting: None
    channels_last: bool = True

    @property
    def memory_format(self) -> torch.memory_format:
        """Of parameters and images."""
        return torch.channels_last if self.channels_last else torch.contiguous_format


class Graphed(nn.Module):
    """A network compiled into CUDA graphs, told where a step begins: outputs of the one before may go."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        model.compile(mode="reduce-overhead")

    def forward(self, x: Tensor) -> Tensor:
        """As the network's own."""
        torch.compiler.cudagraph_mark_step_begin()
        out: Tensor = self.model(x)
        return out


def _compile_obstacle(setting: Setting) -> str | None:
    for variable in ("TORCH_COMPILE_DISABLE", "TORCHDYNAMO_DISABLE"):
        if os.environ.get(variable, "0") not in ("", "0"):
            return f"{variable} is set, so torch.compile would run eager code"
    return None


def _graphs_obstacle(setting: Setting) -> str | None:
    if setting.device.type != "cuda":
        return f"CUDA graphs need --device cuda, got {setting.device}"
    return _compile_obstacle(setting)


def _autotuned(model: nn.Module) -> nn.Module:
    model.compile(mode="max-autotune")
    return model


def _compiled(model: nn.Module) -> nn.Module:
    model.compile()
    return model


def _same(model: nn.Module) -> nn.Module:
    return model


BASELINES: dict[str, Baseline] = {
    "eager": Baseline("eager NCHW", _same, channels_last=False),
    "nhwc": Baseline("eager channels_last", _same),
    "compile": Baseline("compile channels_last", _compiled, _compile_obstacle),
    "max-autotune": Baseline("compile max-autotune", _autotuned, _compile_obstacle),
    "compile-graphs": Baseline("compile CUDA graphs", Graphed, _graphs_obstacle),
    "apex": Baseline("apex NHWC batch norm", rivals.with_apex, lambda s: rivals.apex_obstacle(s.device, s.kind)),
    "inplace-abn": Baseline(
        "InPlace-ABN, leaky ReLU", rivals.with_inplace_abn, lambda s: rivals.inplace_abn_obstacle()
    ),
}
