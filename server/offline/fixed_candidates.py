"""A generator of candidates that are there already, so that reranking is best-of-N with nothing to draw."""

from collections.abc import AsyncIterator, Sequence
from types import TracebackType
from typing import Self

from reranker.candidate import Candidate, Prompt
from server.generation.base import FixedWeights, Outcome, SamplingParams


class FixedCandidates(FixedWeights):
    """`Generator` over the candidates of one prompt."""

    def __init__(self, candidates: Sequence[Candidate], model: str = "given") -> None:
        self.model = model
        self._candidates = candidates

    def generate(
        self, prompt: Prompt, sampling: SamplingParams, n: int, *, stream_partial: bool = False
    ) -> "FixedGeneration":
        return FixedGeneration(self._candidates[:n])

    async def check_ready(self) -> None:
        """They are there."""

    async def close(self) -> None:
        """Holds nothing."""


class FixedGeneration:
    """Hands all of them on at once."""

    prompt_tokens = 0

    def __init__(self, candidates: Sequence[Candidate]) -> None:
        self._candidates = candidates

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing runs."""

    async def __aiter__(self) -> AsyncIterator[list[Outcome]]:
        yield list(self._candidates)

    async def cancel(self, index: int) -> None:
        """Nothing runs."""
