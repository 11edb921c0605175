"""The progress of a run on stderr: a bar if it is a terminal, and warnings in any case."""

from collections.abc import Mapping
from types import TracebackType
from typing import Self

from rich.console import Console

from reranker.progress_bar import ProgressBar


class TrainingProgress:
    """A progress bar over steps, with the metrics of the last step."""

    def __init__(self, total: int, done: int, *, shown: bool) -> None:
        self._console = Console(stderr=True)
        self._bar = ProgressBar(self._console, total, done, shown=shown)

    def __enter__(self) -> Self:
        self._bar.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.__exit__(kind, error, trace)

    def step(self, row: Mapping[str, float]) -> None:
        """Advances the bar by a step, whose metrics are `row`."""
        text = f"reward {row['reward']:.3f} · KL {row['kl']:.2f} · {row['drawn_tokens_per_s']:.0f} tokens/s"
        self._bar.advance(text)

    def warn(self, sentence: str) -> None:
        """Prints a warning above the bar."""
        self._console.print(f"Warning: {sentence}", style="yellow", markup=False, highlight=False, soft_wrap=True)
