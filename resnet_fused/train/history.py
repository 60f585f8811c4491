"""What a run has seen: curves kept in checkpoints, and the same as JSON lines for other tools."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from .errors import UserError

METRICS = "metrics.jsonl"


class History:
    """Loss, error and seconds of every step of every lane, and every evaluation.

    Args:
        lanes: names, in the order of the lanes.
        evaluated: the images they are evaluated on, ``test`` or ``validation``.
    """

    def __init__(self, lanes: list[str], evaluated: str = "test") -> None:
        self.lanes = lanes
        self.evaluated = evaluated
        self.losses: dict[str, list[float]] = {name: [] for name in lanes}
        self.errors: dict[str, list[float]] = {name: [] for name in lanes}
        self.seconds: dict[str, list[float]] = {name: [] for name in lanes}
        self.evaluations: list[dict[str, Any]] = []

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain types."""
        return {
            "losses": {name: torch.tensor(values, dtype=torch.float64) for name, values in self.losses.items()},
            "errors": {name: torch.tensor(values, dtype=torch.float64) for name, values in self.errors.items()},
            "seconds": {name: torch.tensor(values, dtype=torch.float64) for name, values in self.seconds.items()},
            "evaluations": list(self.evaluations),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.losses = {name: state["losses"][name].tolist() for name in self.lanes}
        self.errors = {name: state["errors"][name].tolist() for name in self.lanes}
        self.seconds = {name: state["seconds"][name].tolist() for name in self.lanes}
        self.evaluations = list(state["evaluations"])


class MetricsFile:
    """``metrics.jsonl``: one JSON object a line, each with an ``event``, whole after every line.

    Args:
        folder: the run's.  resume_at: keep the lines up to this iteration only; None starts afresh.

    Raises:
        UserError: the folder cannot be made or written to.
    """

    def __init__(self, folder: Path, resume_at: int | None = None) -> None:
        self.path = folder / METRICS
        try:
            folder.mkdir(parents=True, exist_ok=True)
            kept = [] if resume_at is None else self._lines_until(resume_at)
            whole = self.path.with_name(f"{METRICS}.{os.getpid()}.new")
            whole.write_text("".join(kept), encoding="utf-8")
            os.replace(whole, self.path)
            self._file = self.path.open("a", encoding="utf-8")
        except OSError as error:
            raise UserError(f"train: --out {folder}: cannot be written to: {error}") from error

    def _lines_until(self, iteration: int) -> list[str]:
        if not self.path.is_file():
            return []
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines(keepends=True):
            try:
                event = json.loads(line)
            except json.JSONDecodeError:
                break  # the line that was being written when the run was killed
            if event["event"] != "summary" and event["iteration"] <= iteration:
                kept.append(line)
        return kept

    def write(self, event: str, iteration: int, **values: Any) -> None:
        """Append one line and hand it to the operating system."""
        self._file.write(json.dumps({"event": event, "iteration": iteration, **values}) + "\n")
        self._file.flush()

    def close(self) -> None:
        """No more lines."""
        self._file.close()


class NoMetrics:
    """A `MetricsFile` that keeps nothing, for the ranks that do not write."""

    def write(self, event: str, iteration: int, **values: Any) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""
