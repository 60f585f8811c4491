"""Run host code that launches Triton kernels, with each launch executed as compiled PTX on CPU tensors.

with on_ptx("sm_90") as launches:
    y = my_wrapper(cpu_tensors)
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from triton.runtime.autotuner import Autotuner
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from resnet_fused.compiling.driver import FakeDriver, parse_target, replaced_launch
from tests.emulation import ptx
from tests.emulation.ptx_memory import Stats


@dataclasses.dataclass(frozen=True)
class ExecutedLaunch:
    """One launch: the kernel's name, `ptx.launch`'s counts, and the PTX that ran."""

    name: str
    stats: Stats
    text: str = dataclasses.field(repr=False)


def _bound_arguments(function: JITFunction, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    names = {parameter.name for parameter in function.params}
    bound = function.signature.bind(*args, **{k: v for k, v in kwargs.items() if k in names})
    bound.apply_defaults()
    return dict(bound.arguments)


@contextlib.contextmanager
def on_ptx(target: str = "sm_80", edit: Callable[[str], str] | None = None) -> Iterator[list[ExecutedLaunch]]:
    """Compile each launch in the block for ``target`` ("sm_80" or "sm_90") and execute its PTX.

    An autotuned kernel runs its first configuration.

    Args:
        edit: changes the PTX before it runs, to plant a bug.

    Yields:
        A list that gains one `ExecutedLaunch` per launch.

    Raises:
        PTXError: at a launch that does something wrong.
    """
    launches: list[ExecutedLaunch] = []

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> Any:
        compiled = genuine(self, *args, grid=grid, warmup=True, **kwargs)
        bound = _bound_arguments(self, args, kwargs)
        size = tuple(grid(bound) if callable(grid) else grid)
        values = [bound[name] for name, dtype in compiled.src.signature.items() if dtype != "constexpr"]
        text = compiled.asm["ptx"]
        text = edit(text) if edit else text
        stats = ptx.launch(text, values, size, 32 * compiled.metadata.num_warps, compiled.metadata.shared)
        launches.append(ExecutedLaunch(self.fn.__name__, stats, text))
        return compiled

    def autotune(self: Autotuner, *args: Any, **kwargs: Any) -> Any:
        self.nargs = dict(zip(self.arg_names, args))
        chosen = self.prune_configs(kwargs)[0]
        self.nargs = None
        return self.fn.run(*args, **kwargs, **chosen.all_kwargs())

    with replaced_launch(run, autotune) as genuine:
        driver.set_active(FakeDriver(parse_target(target)))
        yield launches
