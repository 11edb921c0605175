"""Asks a judge one question and returns one answer; the judge is the served policy or a model on another server.

Some servers refuse a JSON schema. A question that is refused with one is asked again without it; if that succeeds, the
server is never sent one again, and this is logged once.
"""

import logging
from collections.abc import Awaitable
from typing import Any

from reranker.candidate import Candidate, Prompt
from reranker.scorers.base import ScoringError, UnscorableError
from reranker.scorers.judge import JudgeAnswer
from server.errors import BadRequestError, ContextLengthError, NbestError
from server.generation.base import Generator, Outcome, SamplingParams

MAX_ANSWER_TOKENS = 64
"""Several times the length of a grade in JSON; a longer answer is cut."""

log = logging.getLogger("nbest")


class JudgeClient:
    """Implements `reranker.scorers.judge.JudgeModel` with a generator, or with an awaitable of one that is starting."""

    def __init__(self, generator: Generator | Awaitable[Generator]) -> None:
        self._generator = generator
        self._takes_schema = True

    async def __call__(self, question: Prompt, json_schema: dict[str, Any]) -> JudgeAnswer:
        """One greedy sample.

        Raises:
            ScoringError: the sample failed, with the generator's error message.
            UnscorableError: the generator refuses the question.
        """
        generator = await self._generator if isinstance(self._generator, Awaitable) else self._generator
        try:
            return await self._ask(generator, question, json_schema)
        except BadRequestError as error:
            raise UnscorableError(f"the judge did not answer: {error.message}") from error
        except NbestError as error:
            raise ScoringError(f"the judge did not answer: {error.message}") from error

    async def _ask(self, generator: Generator, question: Prompt, json_schema: dict[str, Any]) -> JudgeAnswer:
        """Asks with the schema if the server takes schemas; raises the generator's errors."""
        if not self._takes_schema:
            return await _sampled(generator, question, None)
        try:
            return await _sampled(generator, question, json_schema)
        except ContextLengthError:
            raise
        except BadRequestError as error:
            refusal = error.message
        answer = await _sampled(generator, question, None)
        if self._takes_schema:  # other calls may have found it out meanwhile
            self._takes_schema = False
            log.warning("The judge %s takes no JSON schema, so it is asked without one: %s", generator.model, refusal)
        return answer


async def _sampled(generator: Generator, question: Prompt, json_schema: dict[str, Any] | None) -> JudgeAnswer:
    sampling = SamplingParams(max_tokens=MAX_ANSWER_TOKENS, temperature=0.0, json_schema=json_schema)
    outcome: Outcome | None = None
    async with generator.generate(question, sampling, 1) as generation:
        async for outcomes in generation:
            outcome = outcomes[-1]
        prompt_tokens = generation.prompt_tokens
    if not isinstance(outcome, Candidate):
        raise ScoringError(f"the judge did not answer: {outcome.reason if outcome else 'it sent nothing'}")
    return JudgeAnswer(outcome.text, prompt_tokens + outcome.num_tokens)
