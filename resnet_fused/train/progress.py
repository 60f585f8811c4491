"""Progress on a terminal as a bar, elsewhere as a line now and then."""

from __future__ import annotations

import importlib.util
import sys
import time
from types import TracebackType
from typing import Any, TextIO

from typing_extensions import Self

_SECONDS_PER_LINE = 10.0


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class Progress:
    """A bar with images per second and the time left, by rich where it is installed.

    Args:
        total: iterations of the run.  done: how many of them were made before.  stream: where to write.
    """

    def __init__(self, total: int, done: int = 0, stream: TextIO | None = None) -> None:
        self.total = total
        self.stream = stream if stream is not None else sys.stdout
        self._first = done
        self._start = self._last_line = time.monotonic()
        self._bar: Any = None
        if self.stream.isatty() and importlib.util.find_spec("rich") is not None:
            self._bar = self._rich_bar(done)

    def _rich_bar(self, done: int) -> Any:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        columns = (MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[text]}"), TimeRemainingColumn())
        bar = RichProgress(*columns, console=Console(file=self.stream))
        self._task = bar.add_task("train", total=self.total, completed=done, text="")
        return bar

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, iteration: int, text: str) -> None:
        """``iteration`` steps are done; ``text`` says how it goes."""
        if self._bar is not None:
            self._bar.update(self._task, completed=iteration, text=text)
            return
        now = time.monotonic()
        if now - self._last_line >= _SECONDS_PER_LINE or iteration == self.total:
            self._last_line = now
            left = (now - self._start) / max(1, iteration - self._first) * (self.total - iteration)
            self.say(f"{iteration}/{self.total}  {text}  left {_clock(left)}")

    def say(self, line: str) -> None:
        """Print ``line`` above the bar."""
        if self._bar is not None:
            self._bar.console.print(line, markup=False, highlight=False)
        else:
            print(line, file=self.stream, flush=True)
