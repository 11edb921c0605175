"""Asks a judge one question and returns one answer; the judge is the served policy or a model on another server."""

from collections.abc import Awaitable
from typing import Any

from reranker.candidate import Candidate, Prompt
from reranker.scorers.base import ScoringError
from reranker.scorers.judge import JudgeAnswer
from server.errors import NbestError
from server.generation.base import Generator, SamplingParams

MAX_ANSWER_TOKENS = 64
"""Several times the length of a grade in JSON; a longer answer is cut."""


class JudgeClient:
    """Implements `reranker.scorers.judge.JudgeModel` with a generator, or with an awaitable of one that is starting."""

    def __init__(self, generator: Generator | Awaitable[Generator]) -> None:
        self._generator = generator

    async def __call__(self, question: Prompt, json_schema: dict[str, Any]) -> JudgeAnswer:
        """One greedy sample.

        Raises:
            ScoringError: the sample failed, with the generator's error message.
        """
        generator = await self._generator if isinstance(self._generator, Awaitable) else self._generator
        sampling = SamplingParams(max_tokens=MAX_ANSWER_TOKENS, temperature=0.0, json_schema=json_schema)
        try:
            async with generator.generate(question, sampling, 1) as generation:
                all_outcomes = [outcome async for outcomes in generation for outcome in outcomes]
                prompt_tokens = generation.prompt_tokens
        except NbestError as error:
            raise ScoringError(f"the judge did not answer: {error.message}") from error
        (outcome,) = all_outcomes
        if not isinstance(outcome, Candidate):
            raise ScoringError(f"the judge did not answer: {outcome.reason}")
        return JudgeAnswer(outcome.text, prompt_tokens + outcome.num_tokens)
