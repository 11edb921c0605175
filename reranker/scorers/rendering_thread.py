"""Rendering off the event loop, in exactly one thread: a tokenizer must not be used from two at once."""

import asyncio
import math
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

from reranker.candidate import Candidate, Prompt
from reranker.models.rendering import Rendered, RenderingError
from reranker.scorers.base import ScoringError


class RenderingThread:
    """Renders candidates with one renderer, whose `render` is given."""

    def __init__(self, render: Callable[[Prompt, str], Rendered]) -> None:
        self._render = render
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rendering")

    async def render(self, prompt: Prompt, candidates: Sequence[Candidate]) -> list[Rendered | None]:
        """The tokens of each candidate, None for one that cannot be rendered.

        Raises:
            ScoringError: none can; the message is the first one's reason.
        """
        loop = asyncio.get_running_loop()
        outcomes = await loop.run_in_executor(self._thread, self._render_all, prompt, candidates)
        rendered = [one if isinstance(one, Rendered) else None for one in outcomes]
        if not any(rendered):
            raise ScoringError(str(outcomes[0]))
        return rendered

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _render_all(self, prompt: Prompt, candidates: Sequence[Candidate]) -> list[Rendered | RenderingError]:
        return [self._render_one(prompt, candidate.text) for candidate in candidates]

    def _render_one(self, prompt: Prompt, text: str) -> Rendered | RenderingError:
        try:
            return self._render(prompt, text)
        except RenderingError as error:
            return error


def in_place(rewards: Iterable[float], rendered_N: Sequence[Rendered | None]) -> tuple[float, ...]:
    """The rewards of those that could be rendered, each in its place, NaN in the others'."""
    remaining = iter(rewards)
    return tuple(math.nan if one is None else next(remaining) for one in rendered_N)
