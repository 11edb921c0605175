"""What a person sees while a run goes on: how far it is, how fast, how good, and how long it still takes."""

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from server.offline.records import Failure, Result


class RunProgress:
    """Counts this run's records, and shows them where there is a terminal. `seen` of `total` lines were done before."""

    def __init__(self, console: Console, total: int, seen: int) -> None:
        self.results = 0
        self.failures = 0
        self.generated_tokens = 0
        self._reward_sum = 0.0
        self._rewarded = 0
        self._bar = Progress(
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[told]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=total, completed=seen, told="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def wrote(self, record: Result | Failure) -> None:
        if isinstance(record, Failure):
            self.failures += 1
        else:
            self.results += 1
            self.generated_tokens += record.generated_tokens
            if record.winner.reward is not None:
                self._reward_sum += record.winner.reward
                self._rewarded += 1
        self._bar.update(self._task, advance=1, told=self._told())

    def _told(self) -> str:
        elapsed_s = self._bar.tasks[self._task].elapsed or 0.0
        parts = [f"{self.generated_tokens / elapsed_s:.0f} tokens/s"] if elapsed_s else []
        if self._rewarded:
            parts.append(f"reward {self._reward_sum / self._rewarded:.2f}")
        if self.failures:
            parts.append(f"{self.failures} failed")
        return " · ".join(parts)
