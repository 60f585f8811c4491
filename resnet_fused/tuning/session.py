"""`tune`: measure what may run at every site of a model on this device, keep the winners, use them."""

from __future__ import annotations

import contextlib
import math
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import plan, winners
from ..winners import Winner, store
from . import ranks
from .candidates import in_private
from .measure import Measurement, Progress
from .race import LEAST_ROUNDS, Outcome, Timer
from .report import TuneReport
from .sites import collect
from .steps import Step, private_copy, race_steps

_STEPS_SHARE = 0.3  # of the time, at most, for the race of whole steps
_STEPS = 2 * (LEAST_ROUNDS + 2)  # of that race: both sides, warm-up included


def tune(
    model: nn.Module,
    sample: Tensor | tuple[Any, ...],
    *,
    memory: str | None = None,
    engine: str | None = None,
    time_limit: float = 60.0,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    timer: Timer | None = None,
) -> TuneReport:
    """Measure the ways in which each site of ``model`` can run on this device, and use the fastest from now on.

    One training step of a fused private copy says which problems there are. For each, forward and backward of every
    candidate run on random tensors of the same shapes: first held to the numerics law, then timed in turns. A candidate
    replaces the rules' choice only when it is clearly faster, and all new winners are dropped if whole steps are slower
    with them. Plain and fused models with the same shapes share the winners. The model, its gradients, its buffers and
    the random state stay as they are. Under ``torch.autocast`` the step runs in its dtype.

    Ctrl-C ends the measurement, not the program: what is finished is kept, and the report says so. In a distributed
    process every rank calls this; rank 0 measures, and all ranks then use its winners. What `torch.compile` has traced
    is traced again.

    Args:
        model: fused or not, on the device to measure.
        sample: its input ``(N, C, H, W)``, in the shape, dtype and memory format of training; or all its arguments.
        memory, engine: as in `resnet_fused.fuse`; None takes a fused model as it is, and the defaults for another.
        time_limit: seconds; the most expensive problems come first, the rest stays on the rules. At least three
            whole steps on either side are timed all the same.
        cache_dir: where to keep the winners; None: ``$RESNET_FUSED_CACHE``, else the user's cache folder. A folder that
            cannot be written to is warned of: the winners then hold for this process.
        progress: called with the number of decisions made, of all, and words.
        timer: for tests: what tells the time.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: a ``time_limit`` that is not above 0, a sample without a tensor or on another device than the model,
            a device that is neither CPU nor CUDA, or synchronised batch norm in a distributed process.
        RuntimeError: no process group where ``WORLD_SIZE`` is above 1, or rank 0 failed.
    """
    arguments = sample if isinstance(sample, tuple) else (sample,)
    device = _checked(model, arguments, time_limit)

    def here() -> tuple[TuneReport, dict[str, Winner]]:
        return _tune(model, arguments, device, memory, engine, time_limit, cache_dir, progress, timer)

    shared = ranks.joined()
    report, table = ranks.from_rank_zero(here)
    name = winners.device_name(device)
    if shared or cache_dir is not None:
        winners.replace(table, [name])
    else:
        winners.merge(table)
    return report


def _checked(model: nn.Module, sample: tuple[Any, ...], time_limit: float) -> torch.device:
    if not isinstance(model, nn.Module):
        raise TypeError(f"tune: model: expected a torch.nn.Module, got {type(model).__name__}")
    if not (isinstance(time_limit, (int, float)) and 0 < time_limit < math.inf):
        raise ValueError(f"tune: time_limit: expected seconds above 0, got {time_limit!r}")
    devices = {value.device for value in sample if isinstance(value, Tensor)}
    if len(devices) != 1:
        raise ValueError(
            f"tune: sample: expected tensors on one device, got {sorted(map(str, devices)) or 'no tensor'}"
        )
    (device,) = devices
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"tune: sample: expected a tensor on cpu or cuda, got one on {device}")
    held = next((p.device for p in model.parameters()), device)
    if held != device:
        raise ValueError(f"tune: model: expected its parameters on {device} as the sample, got {held}")
    if ranks.joined() and any(isinstance(m, nn.SyncBatchNorm) for m in model.modules()):
        raise ValueError("tune: model: expected no SyncBatchNorm, rank 0 measures alone; tune before it is converted")
    return device


@contextlib.contextmanager
def _undisturbed(device: torch.device) -> Iterator[None]:
    """Nothing of the caller's is changed in the block, and nothing of it forces a variant."""
    gpu = device.type == "cuda"
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[device] if gpu else []))
        stack.enter_context(plan.force(None))
        if gpu:
            stack.enter_context(torch.cuda.device(device))
        yield


def _tune(
    model: nn.Module,
    sample: tuple[Any, ...],
    device: torch.device,
    memory: str | None,
    engine: str | None,
    time_limit: float,
    cache_dir: str | os.PathLike[str] | None,
    progress: Progress | None,
    timer: Timer | None,
) -> tuple[TuneReport, dict[str, Winner]]:
    """The report, and the table to use from now on."""
    timer = timer or Timer(device)
    start = timer.now()
    name, where = winners.device_name(device), store.folder(cache_dir)
    unwritable = _unwritable(where)
    if cache_dir is None:
        winners.ready(name)
    before = {**winners.table(), **({} if cache_dir is None else store.load(name, cache_dir))}
    with _undisturbed(device):
        step = Step(private_copy(model, memory, engine), tuple(map(_private, sample)))
        with in_private(), winners.using({}):
            problems = collect(step)
        reserved = min(_STEPS_SHARE * time_limit, _STEPS * (timer.now() - start))
        work = Measurement(problems, device, timer, start + time_limit - reserved, progress or _silent)
        interrupted = _until_interrupted(work.run)
        changed = _changed(work, before)
        outcome: list[Outcome | None] = []
        if changed and not interrupted:
            after = {**before, **work.table}
            interrupted = _until_interrupted(
                lambda: outcome.append(race_steps(step, before, after, timer, start + time_limit))
            )
    raced = next(iter(outcome), None)
    vetoed = raced is not None and raced.slower("tuned")
    new = {key: winner for key, winner in work.table.items() if not (vetoed and key in changed)}
    written, notes = _keep(name, new, where, unwritable)
    table = {**before, **new}
    report = TuneReport(
        name,
        tuple(work.measured),
        work.undecided,
        None if raced is None else raced.ratio("tuned"),
        vetoed,
        written,
        (*work.notes, *notes),
        timer.now() - start,
        interrupted,
        store.digest(table) if table else "",
    )
    return report, table


def _private(value: Any) -> Any:
    return value.detach().clone(memory_format=torch.preserve_format) if isinstance(value, Tensor) else value


def _silent(*_: object) -> None:
    """No progress is shown."""


def _until_interrupted(work: Callable[[], object]) -> bool:
    """Run ``work``; whether Ctrl-C ended it."""
    try:
        work()
    except KeyboardInterrupt:
        return True
    return False


def _changed(work: Measurement, before: dict[str, Winner]) -> set[str]:
    """The problems whose choice is not the one that would have run without this measurement."""
    used = {key: before[key].choice if key in before else default for key, default in work.defaults.items()}
    return {key for key, winner in work.table.items() if winner.choice != used[key]}


def _unwritable(where: Path) -> str | None:
    try:
        store.check_writable(where)
    except store.StoreError as error:
        warnings.warn(f"resnet_fused.tune: {error}; the winners will hold for this process alone", stacklevel=5)
        return str(error)
    return None


def _keep(
    device: str, new: dict[str, Winner], where: Path, unwritable: str | None
) -> tuple[str | None, tuple[str, ...]]:
    """Write the winners; the file, and what there is to say about it."""
    if unwritable is not None:
        return None, (f"the winners hold for this process alone: {unwritable}",)
    if not new:
        return None, ()
    try:
        return str(store.save(device, new, where)), ()
    except store.StoreError as error:
        warnings.warn(f"resnet_fused.tune: {error}; the winners hold for this process alone", stacklevel=5)
        return None, (f"the winners hold for this process alone: {error}",)
