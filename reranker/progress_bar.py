"""The progress bar of the long-running commands."""

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class ProgressBar:
    """`done` of `total` steps, the remaining time, and a text beside it; silent if `console` is not a terminal."""

    def __init__(self, console: Console, total: int, done: int = 0, *, title: str = "", shown: bool = True) -> None:
        self._progress = Progress(
            TextColumn(title) if title else MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not (shown and console.is_terminal),
        )
        self._task = self._progress.add_task("", total=total, completed=done, text="")

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    @property
    def elapsed_s(self) -> float:
        """Seconds since the bar was created."""
        return self._progress.tasks[self._task].elapsed or 0.0

    def advance(self, text: str = "") -> None:
        """Counts one more step as done; `text` replaces the text beside the bar."""
        self._progress.update(self._task, advance=1, text=text)
