"""A whole benchmark: for every network a proof, then races, and all of it as plain data."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..checking import check, exercise
from ..fuse import fuse
from ..train.models import build_model, input_channels
from . import machine, spread
from .baselines import BASELINES, Setting
from .contest import LEARNING_RATE, MOMENTUM, Batch, Contestant, Inference, TrainingStep
from .memory import Memory, measure
from .race import Race, clock_for, first_line

FORMAT, VERSION = "resnet_fused.bench", 1
GATE_IMAGES = 8
BATCHES = 4
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MODES = ("train", "infer")
Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is timed, and how; ``image`` in pixels, ``warm_up`` and ``rounds`` in steps of every contestant.

    ``dtype`` is of parameters and images, ``amp`` ``"off"`` or the dtype of autocast; ``threads`` of 0 is torch's.
    """

    models: tuple[str, ...] = ("resnet18", "resnet50")
    baselines: tuple[str, ...] = ("eager", "nhwc", "compile")
    batch: int = 8
    image: int = 224
    dtype: str = "fp32"
    amp: str = "off"
    memory: tuple[str, ...] = ("speed",)
    mode: tuple[str, ...] = ("train",)
    rounds: int = 11
    warm_up: int = 2
    device: str = "cpu"
    threads: int = 0
    seed: int = 0

    def setting(self) -> Setting:
        """Device and dtypes as torch's."""
        return Setting(torch.device(self.device), DTYPES[self.dtype], DTYPES.get(self.amp))

    def ours(self) -> dict[str, str]:
        """Our contestants by name, and their memory modes."""
        if len(self.memory) == 1:
            return {"fused": self.memory[0]}
        return {f"fused {memory}": memory for memory in self.memory}

    def steps(self) -> int:
        """Rounds of the whole benchmark, for a progress bar."""
        return len(self.models) * len(self.mode) * self.rounds


def make_batches(settings: Settings, channels: int, classes: int, layout: torch.memory_format) -> list[Batch]:
    """The same images and labels for the same settings, in any memory format."""
    generator = torch.Generator().manual_seed(settings.seed)
    where = settings.setting()

    def images() -> Tensor:
        drawn = torch.randn(settings.batch, channels, settings.image, settings.image, generator=generator)
        return drawn.to(where.device, where.dtype).contiguous(memory_format=layout)

    def labels() -> Tensor:
        return torch.randint(classes, (settings.batch,), generator=generator).to(where.device)

    return [(images(), labels()) for _ in range(BATCHES)]


class Proof(NamedTuple):
    """A memory mode of a network under the numerics law.

    Args:
        tensors: how many were judged.  setting: shape, dtype and mode in words.  reason: why it fails, or None.
    """

    memory: str
    tensors: int
    setting: str
    reason: str | None


def prove(stock: nn.Module, settings: Settings) -> list[Proof]:
    """The numerics law for every memory mode, before anything is timed.

    At the image size and dtype that are timed, and at most 8 images: float64 has to fit beside it.
    """
    dtype = settings.dtype if settings.amp == "off" else f"amp-{settings.amp}"
    shape = (min(settings.batch, GATE_IMAGES), input_channels(stock), settings.image, settings.image)
    telling = exercise(copy.deepcopy(stock), settings.seed)
    proofs = []
    for memory in settings.memory:
        try:
            report = check(telling, shape=shape, dtype=dtype, seed=settings.seed, memory=memory)
        except Exception as error:  # whatever keeps it from being proven keeps it from being timed
            proofs.append(Proof(memory, 0, "", f"memory {memory!r} could not be checked: {first_line(error)}"))
            continue
        failed = [verdict for verdict in report.ranked() if not verdict.passed]
        worst = str(failed[0]) if failed else "no tensor was compared"
        reason = f"memory {memory!r} is not right: {len(failed)} tensors break the law, first {worst}"
        proofs.append(Proof(memory, len(report.verdicts), report.setting, None if report.passed else reason))
    return proofs


class Session:
    """Networks one after another; after Ctrl-C it holds what is finished.

    Args:
        settings: already checked against what is here.
        say: takes a line about what is going on.  advance: called after every round.
    """

    def __init__(self, settings: Settings, say: Say, advance: Callable[[], None] = lambda: None) -> None:
        self.settings = settings
        self.results: list[dict[str, Any]] = []
        self.not_timed: list[dict[str, str]] = []
        self.interrupted = False
        self._say, self._advance = say, advance
        self._date = machine.now()

    def run(self) -> None:
        """Prove and time; returns early, without an error, after Ctrl-C."""
        where = self.settings.setting().device
        try:
            if where.type == "cuda" and where.index is not None:
                torch.cuda.set_device(where)
            for name in self.settings.models:
                self._model(name)
        except KeyboardInterrupt:
            self.interrupted = True

    def _model(self, name: str) -> None:
        settings, where = self.settings, self.settings.setting()
        torch.manual_seed(settings.seed)
        stock = build_model(name).to(where.device)
        self._say(f"{name}: checking against float64")
        proofs = prove(stock, settings)
        if reasons := [proof.reason for proof in proofs if proof.reason]:
            self.not_timed.append({"model": name, "reason": "; ".join(reasons)})
            self._say(f"{name}: not timed: {self.not_timed[-1]['reason']}")
            return
        stock = stock.to(where.dtype)
        for mode in settings.mode:
            self._race(name, stock, mode, proofs)

    def _race(self, name: str, stock: nn.Module, mode: str, proofs: list[Proof]) -> None:
        settings = self.settings
        torch.compiler.reset()
        failed: dict[str, str] = {}
        contestants = self._contestants(stock, mode, failed)
        race = Race(contestants, clock_for(settings.setting().device))
        race.failed.update(failed)
        memory: dict[str, Memory] = {}
        for contestant in list(race.steps):
            self._say(f"{name}, {mode}: warming up {contestant}")
            race.warm_up(settings.warm_up, contestant)
            race.attempt(contestant, lambda step: memory.update({contestant: measure(contestants[contestant])}))  # noqa: B023
            if contestant in race.failed:
                del contestants[contestant]
        self._say(f"{name}, {mode}: {settings.rounds} rounds of {', '.join(race.steps)}")
        try:
            for _ in range(settings.rounds):
                race.round()
                self._advance()
        finally:
            if race.rounds:
                result = self._result(race, contestants, memory)
                facts = {"model": name, "mode": mode, "proofs": [proof._asdict() for proof in proofs]}
                self.results.append({**facts, **result, "losses": losses(result["contestants"])})

    def _contestants(self, stock: nn.Module, mode: str, failed: dict[str, str]) -> dict[str, Contestant]:
        """Ours and theirs, each on a copy of its own; one that cannot be made is in ``failed``."""
        settings, amp = self.settings, self.settings.setting().amp
        channels = input_channels(stock)
        classes = _classes(stock, channels, settings)
        builds: dict[str, tuple[torch.memory_format, Callable[[nn.Module], nn.Module]]] = {
            name: (torch.channels_last, _fusing(memory)) for name, memory in settings.ours().items()
        }
        builds |= {name: (BASELINES[name].memory_format, BASELINES[name].build) for name in settings.baselines}
        made: dict[str, Contestant] = {}
        batches: dict[torch.memory_format, list[Batch]] = {}
        for name, (layout, build) in builds.items():
            if layout not in batches:
                batches[layout] = make_batches(settings, channels, classes, layout)
            try:
                model = build(copy.deepcopy(stock).to(memory_format=layout))
            except Exception as error:  # a baseline that fails is a row with its reason
                failed[name] = first_line(error)
                continue
            if mode == "train":
                made[name] = TrainingStep(model, batches[layout], amp)
            else:
                made[name] = Inference(model, batches[layout][0][0], amp)
        return made

    def _result(self, race: Race, contestants: dict[str, Contestant], memory: dict[str, Memory]) -> dict[str, Any]:
        settings = self.settings
        ours = list(settings.ours())
        finished = race.finished()
        rows = [
            self._row(contestant, race, contestants.get(contestant), memory.get(contestant))
            for contestant in [*ours, *settings.baselines]
        ]
        pairs = [(a, b) for a in ours for b in settings.baselines if a in finished and b in finished]
        return {
            "rounds": race.rounds,
            "contestants": rows,
            "comparisons": [
                {**dataclasses.asdict(found), "verdict": found.verdict}
                for found in (race.compare(a, b) for a, b in pairs)
            ],
        }

    def _row(self, name: str, race: Race, contestant: Contestant | None, memory: Memory | None) -> dict[str, Any]:
        ours = name in self.settings.ours()
        row: dict[str, Any] = {"name": name, "ours": ours, "label": name if ours else BASELINES[name].label}
        row["failed"] = race.failed.get(name)
        if name not in race.finished() or contestant is None:
            return row
        row |= race.figures(name)
        row["images_per_second"] = 1e3 * self.settings.batch / row["milliseconds"]["step"]["median"]
        row["peak_bytes"], row["kept_bytes"] = memory if memory is not None else (None, None)
        row["losses"] = [loss.item() for loss in contestant.losses]
        return row

    def exit_code(self) -> int:
        """1 when a network was not right, or ours did not run; 0 otherwise."""
        rows = [row for result in self.results for row in result["contestants"]]
        return 1 if self.not_timed or any(row["ours"] and row["failed"] for row in rows) else 0

    def document(self, command: str) -> dict[str, Any]:
        """Everything, for the JSON file, tables and plots."""
        settings, where = self.settings, self.settings.setting()
        return {
            "format": FORMAT,
            "version": VERSION,
            "machine": machine.describe(where.device, where.kind),
            "versions": machine.versions(),
            "date": self._date,
            "command": command,
            "settings": dataclasses.asdict(settings),
            "method": {"interval": spread.METHOD, "optimizer": f"SGD, lr {LEARNING_RATE}, momentum {MOMENTUM}"},
            "interrupted": self.interrupted,
            "not_timed": self.not_timed,
            "results": self.results,
        }


def _fusing(memory: str) -> Callable[[nn.Module], nn.Module]:
    return lambda model: fuse(model, memory=memory)


def _classes(stock: nn.Module, channels: int, settings: Settings) -> int:
    """Outputs of the network."""
    where = settings.setting()
    image = torch.zeros(1, channels, settings.image, settings.image, device=where.device, dtype=where.dtype)
    with torch.no_grad():
        return int(copy.deepcopy(stock).eval()(image).shape[1])


def losses(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Every contestant's last loss, its distance to eager's, and that of eager's two memory formats.

    All took the same steps on the same batches from the same parameters, so that the distances are rounding,
    amplified by training. ``to_eager`` is empty where eager was not among them, ``between_eager_formats`` None where
    one of the two was not. None for inference.
    """
    curves = {row["name"]: row["losses"] for row in rows if row.get("losses")}
    if not curves:
        return None
    steps = min(map(len, curves.values()))  # after Ctrl-C some are a step ahead
    last = {name: curve[steps - 1] for name, curve in curves.items()}
    eager = last.get("eager")
    return {
        "steps": steps,
        "last": last,
        "to_eager": {} if eager is None else {n: abs(v - eager) for n, v in last.items() if n != "eager"},
        "between_eager_formats": abs(last["nhwc"] - eager) if eager is not None and "nhwc" in last else None,
    }
