"""Renders candidates outside the event loop, in exactly one thread, because tokenizers are not thread-safe."""

import asyncio
import math
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

from reranker.candidate import Candidate, Prompt
from reranker.models.rendering import Rendered, Renderer, RenderingError, TooLongError
from reranker.scorers.base import UnscorableCandidatesError, UnscorableError


class RenderingThread:
    """Runs a renderer in a thread of its own, for the scorer of that name."""

    def __init__(self, name: str, renderer: Renderer) -> None:
        self._name = name
        self._renderer = renderer
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rendering")

    async def check(self, prompt: Prompt) -> None:
        """Returns if candidates of this prompt can be rendered.

        Raises:
            UnscorableError: none can.
        """
        try:
            await asyncio.get_running_loop().run_in_executor(self._thread, self._renderer.check, prompt)
        except RenderingError as error:
            raise UnscorableError(f"{self._name}: {error}") from error

    async def render(self, prompt: Prompt, candidates: Sequence[Candidate]) -> list[Rendered | None]:
        """The tokens of each candidate, in order; None for a candidate that cannot be rendered.

        Raises:
            UnscorableError: no candidate can be rendered; the message is the reason for the first.
        """
        loop = asyncio.get_running_loop()
        outcomes = await loop.run_in_executor(self._thread, self._render_all, prompt, candidates)
        rendered_N = [outcome if isinstance(outcome, Rendered) else None for outcome in outcomes]
        if not any(rendered_N):
            unscorable = UnscorableCandidatesError if isinstance(outcomes[0], TooLongError) else UnscorableError
            raise unscorable(f"{self._name}: {outcomes[0]}")
        return rendered_N

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _render_all(self, prompt: Prompt, candidates: Sequence[Candidate]) -> list[Rendered | RenderingError]:
        return [self._render_or_error(prompt, candidate.text) for candidate in candidates]

    def _render_or_error(self, prompt: Prompt, text: str) -> Rendered | RenderingError:
        try:
            return self._renderer.render(prompt, text)
        except RenderingError as error:
            return error


def with_missing(rewards: Iterable[float], rendered_N: Sequence[Rendered | None]) -> tuple[float, ...]:
    """rewards_N from the `rewards` of the candidates that were rendered, with NaN for those that were not."""
    remaining = iter(rewards)
    return tuple(math.nan if rendered is None else next(remaining) for rendered in rendered_N)
