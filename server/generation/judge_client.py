"""Asks the served policy one question and returns one answer, for a policy that is its own judge."""

from collections.abc import Awaitable
from typing import Any

from reranker.candidate import Candidate, Prompt
from reranker.scorers.base import ScoringError, UnscorableError
from reranker.scorers.judge import MAX_ANSWER_TOKENS, JudgeAnswer
from server.errors import BadRequestError, NbestError
from server.generation.base import Generator, Outcome, SamplingParams


class JudgeClient:
    """Implements `reranker.scorers.judge.JudgeModel` with a generator, or with an awaitable of one that is starting."""

    def __init__(self, generator: Generator | Awaitable[Generator]) -> None:
        self._generator = generator

    async def __call__(self, question: Prompt, json_schema: dict[str, Any] | None) -> JudgeAnswer:
        """One greedy sample.

        Raises:
            ScoringError: the sample failed, with the generator's error message.
            UnscorableError: the generator refuses the question.
        """
        generator = await self._generator if isinstance(self._generator, Awaitable) else self._generator
        sampling = SamplingParams(max_tokens=MAX_ANSWER_TOKENS, temperature=0.0, json_schema=json_schema)
        outcome: Outcome | None = None
        try:
            async with generator.generate(question, sampling, 1) as generation:
                async for outcomes in generation:
                    outcome = outcomes[-1]
                prompt_tokens = generation.prompt_tokens
        except BadRequestError as error:
            raise UnscorableError(f"the judge did not answer: {error.message}") from error
        except NbestError as error:
            raise ScoringError(f"the judge did not answer: {error.message}") from error
        if not isinstance(outcome, Candidate):
            raise ScoringError(f"the judge did not answer: {outcome.reason if outcome else 'it sent nothing'}")
        return JudgeAnswer(outcome.text, prompt_tokens + outcome.num_tokens)
