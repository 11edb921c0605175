"""A `Generator` that returns existing candidates, so that rerank runs the best-of-N pipeline without an engine."""

from collections.abc import AsyncIterator, Sequence
from types import TracebackType
from typing import Self

from reranker.candidate import Candidate, Prompt
from server.generation.base import FixedWeights, Outcome, SamplingParams


class FixedCandidates(FixedWeights):
    """The candidates of one prompt."""

    def __init__(self, candidates: Sequence[Candidate], model: str = "given") -> None:
        self.model = model
        self._candidates = candidates

    def generate(
        self, prompt: Prompt, sampling: SamplingParams, n: int, *, stream_partial: bool = False
    ) -> "FixedGeneration":
        return FixedGeneration(self._candidates[:n])

    async def check_ready(self) -> None:
        """Is always ready."""

    async def close(self) -> None:
        """Has nothing to free."""


class FixedGeneration:
    """Yields all candidates at once, as finished."""

    prompt_tokens = 0

    def __init__(self, candidates: Sequence[Candidate]) -> None:
        self._candidates = candidates

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing runs that could be cancelled."""

    async def __aiter__(self) -> AsyncIterator[list[Outcome]]:
        yield list(self._candidates)

    async def cancel(self, index: int) -> None:
        """Nothing runs that could be cancelled."""
