"""Everything that decides a run, as one record that checkpoints keep."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from .errors import UserError

Amp = Literal["off", "bf16", "fp16"]


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A run's settings; a run is a function of them and of the data.

    ``validation`` training images are held out to evaluate on, 0 stands for the test images.

    ``batch_size``, ``lr`` and ``iterations`` of 0 stand for the recipe's; ``epochs``, when not 0, wins over
    ``iterations``. ``eval_every`` and ``checkpoint_every`` count iterations, 0 stands for a tenth of the run.
    ``threads`` is the number of CPU threads, 0 torch's own choice. ``image_size``: pixels that images are
    resized to, 0 the data's own. ``sync_bn``: on several ranks, batch norm by the statistics of the whole batch.
    """

    model: str = "cifar-20"
    data: str = "auto"
    data_root: str = ""
    validation: int = 0
    recipe: str = "quick"
    epochs: int = 0
    iterations: int = 0
    batch_size: int = 0
    lr: float = 0.0
    image_size: int = 0
    compare: bool = False
    yardstick: bool = False
    amp: Amp = "off"
    memory: str = "speed"
    channels_last: bool = True
    threads: int = 0
    seed: int = 0
    device: str = "cpu"
    sync_bn: bool = True
    eval_every: int = 0
    checkpoint_every: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain types only, for checkpoints and JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainConfig:
        """The inverse of `to_dict`; a setting that an earlier version had not is left at its default.

        Raises:
            UserError: ``values`` has a field that this version does not know.
        """
        unknown = sorted(set(values) - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise UserError(
                f"train: --resume: the checkpoint has settings that this version does not know: {', '.join(unknown)}"
            )
        return cls(**values)
