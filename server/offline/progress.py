"""The progress bar of an offline run: lines done, tokens per second, mean reward, failures and remaining time."""

from types import TracebackType
from typing import Self

from rich.console import Console

from reranker.progress_bar import ProgressBar
from server.offline.records import Failure, Result


class BatchProgress:
    """Counts the records of this run. `done` of the `total` lines already have records of earlier runs."""

    def __init__(self, console: Console, total: int, done: int) -> None:
        self.results = 0
        self.failures = 0
        self.generated_tokens = 0
        self._reward_sum = 0.0
        self._rewarded = 0
        self._bar = ProgressBar(console, total, done)

    def __enter__(self) -> Self:
        self._bar.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.__exit__(kind, error, trace)

    def count(self, record: Result | Failure) -> None:
        """Counts a record that has been written, and advances the bar by one line."""
        if isinstance(record, Failure):
            self.failures += 1
        else:
            self.results += 1
            self.generated_tokens += record.generated_tokens
            if record.winner.reward is not None:
                self._reward_sum += record.winner.reward
                self._rewarded += 1
        self._bar.advance(self._text())

    def _text(self) -> str:
        elapsed_s = self._bar.elapsed_s
        parts = [f"{self.generated_tokens / elapsed_s:.0f} tokens/s"] if elapsed_s else []
        if self._rewarded:
            parts.append(f"reward {self._reward_sum / self._rewarded:.2f}")
        if self.failures:
            parts.append(f"{self.failures} failed")
        return " · ".join(parts)
