"""One question, one answer, from any generator: how a judge asks the served policy, or a model elsewhere."""

from collections.abc import Awaitable
from typing import Any

from reranker.candidate import Candidate, Prompt
from reranker.scorers.base import ScoringError
from reranker.scorers.judge import Answer
from server.errors import NbestError
from server.generation.base import Generator, SamplingParams

MAX_ANSWER_TOKENS = 64
"""Several times what a grade in JSON takes; a model that rambles on is cut off."""


class JudgeClient:
    """`reranker.scorers.judge.Ask` over a generator, or over one that is still being started."""

    def __init__(self, generator: Generator | Awaitable[Generator]) -> None:
        self._generator = generator

    async def __call__(self, question: Prompt, json_schema: dict[str, Any]) -> Answer:
        """One greedy sample; whatever keeps it from ending becomes a `ScoringError` with the generator's words."""
        generator = await self._generator if isinstance(self._generator, Awaitable) else self._generator
        sampling = SamplingParams(max_tokens=MAX_ANSWER_TOKENS, temperature=0.0, json_schema=json_schema)
        try:
            async with generator.generate(question, sampling, 1) as generation:
                ended = [one async for outcomes in generation for one in outcomes]
                prompt_tokens = generation.prompt_tokens
        except NbestError as error:
            raise ScoringError(f"the judge did not answer: {error.message}") from error
        (outcome,) = ended
        if not isinstance(outcome, Candidate):
            raise ScoringError(f"the judge did not answer: {outcome.reason}")
        return Answer(outcome.text, prompt_tokens + outcome.num_tokens)
