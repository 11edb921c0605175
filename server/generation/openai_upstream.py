"""A generator that samples from another OpenAI-compatible server, the upstream.

One streamed request has `n` = N, so the upstream computes the prompt once. A server that caps or ignores `n` returns
fewer choices: further requests, in parallel and of the size that the server did return, sample the missing ones.

A client cannot stop a single choice of a running request. `cancel` drops the choice's output, and leaving the block
closes the connections, which stops everything that still runs.
"""

import asyncio
import math
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Self

import openai

from reranker.candidate import Candidate, FailedCandidate, FinishReason, Prompt, TokenLogprob
from server.errors import BadRequestError, GenerationError, NbestError, NotReadyError, OverloadedError
from server.generation.base import FixedWeights, Outcome, SamplingParams
from server.generation.outcome_queue import OutcomeQueue

FINISH_REASONS: dict[str, FinishReason] = {"stop": "stop", "length": "length", "content_filter": "content_filter"}


class OpenAIGenerator(FixedWeights):
    """Samples a policy that another server runs.

    Token counts and cumulative log-probabilities are exact where the upstream returns `logprobs`. Without them each
    streamed piece counts as one token, and the log-probability is unknown.
    """

    def __init__(self, model: str, client: openai.AsyncOpenAI, *, upstream_model: str) -> None:
        self.model = model
        self._client = client
        self._upstream_model = upstream_model

    @classmethod
    def connect(cls, base_url: str, api_key: str | None, *, model: str, upstream_model: str) -> Self:
        """A generator for the server at `base_url`, which includes /v1."""
        # The pipeline enforces the request's deadline and decides on a retry.
        client = openai.AsyncOpenAI(base_url=base_url, api_key=api_key or "none", timeout=None, max_retries=0)
        return cls(model, client, upstream_model=upstream_model)

    def generate(
        self, prompt: Prompt, sampling: SamplingParams, n: int, *, stream_partial: bool = False
    ) -> "OpenAIGeneration":
        return OpenAIGeneration(self, prompt, sampling, n, stream_partial)

    async def check_ready(self) -> None:
        try:
            await self._client.models.list(timeout=5)
        except openai.APIError as error:
            raise NotReadyError(f"The upstream server does not answer: {error.message}") from error

    async def close(self) -> None:
        await self._client.close()

    async def stream(self, prompt: Prompt, sampling: SamplingParams, n: int) -> Any:
        """The upstream's stream of chunks for `n` choices.

        Raises:
            NbestError: the upstream refuses the request; the message is the upstream's.
        """
        shared: dict[str, Any] = {
            "model": self._upstream_model,
            "n": n,
            "stream": True,
            "stream_options": {"include_usage": True},
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            **({"max_tokens": sampling.max_tokens} if sampling.max_tokens is not None else {}),
            **({"stop": list(sampling.stop)} if sampling.stop else {}),
            **({"seed": sampling.seed} if sampling.seed is not None else {}),
            **({"presence_penalty": sampling.presence_penalty} if sampling.presence_penalty else {}),
            **({"frequency_penalty": sampling.frequency_penalty} if sampling.frequency_penalty else {}),
            **(
                {"logit_bias": {str(token): bias for token, bias in sampling.logit_bias}} if sampling.logit_bias else {}
            ),
        }
        try:
            if prompt.text is not None:
                if sampling.json_schema is not None:
                    raise BadRequestError("A JSON schema needs the chat endpoint.", param="response_format")
                return await self._client.completions.create(
                    prompt=prompt.text, logprobs=sampling.logprobs or 0, **shared
                )
            if sampling.logprobs:
                shared["top_logprobs"] = sampling.logprobs
            if sampling.json_schema is not None:
                shared["response_format"] = _response_format(sampling.json_schema)
            messages: Any = [{"role": message.role, "content": message.content} for message in prompt.messages]
            return await self._client.chat.completions.create(messages=messages, logprobs=True, **shared)
        except openai.APIError as error:
            raise _as_nbest_error(error) from error


class OpenAIGeneration:
    """One streamed upstream request for all candidates, and further requests where it returned too few."""

    def __init__(
        self, generator: OpenAIGenerator, prompt: Prompt, sampling: SamplingParams, n: int, stream_partial: bool
    ) -> None:
        self.prompt_tokens = 0
        self._generator = generator
        self._prompt = prompt
        self._sampling = sampling
        self._n = n
        self._stream_partial = stream_partial
        self._outcomes = OutcomeQueue(n)
        self._filler: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        stream = await self._generator.stream(self._prompt, self._sampling, self._n)
        self._filler = asyncio.create_task(self._fill(stream))
        self._filler.add_done_callback(self._on_filled)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._filler is not None:
            self._filler.cancel()
            await asyncio.gather(self._filler, return_exceptions=True)

    def __aiter__(self) -> AsyncIterator[list[Outcome]]:
        return aiter(self._outcomes)

    async def cancel(self, index: int) -> None:
        self._outcomes.drop(index)

    async def _fill(self, stream: Any) -> None:
        """Reads the first stream, then samples the missing choices; every candidate finishes or fails."""
        reason = "the upstream returned fewer choices than requested"
        try:
            num_choices = await self._read(stream, first=0)
            if 0 < num_choices < self._n:
                starts = range(num_choices, self._n, num_choices)
                await asyncio.gather(*(self._sample(start, min(num_choices, self._n - start)) for start in starts))
        except NbestError as error:
            reason = error.message
        for index in sorted(self._outcomes.expected):
            self._outcomes.put(FailedCandidate(index, reason))

    def _on_filled(self, filler: asyncio.Task[None]) -> None:
        """Passes an unexpected exception to the iteration, which would otherwise wait forever."""
        if not filler.cancelled() and (error := filler.exception()):
            self._outcomes.fail(error)

    async def _sample(self, first: int, count: int) -> None:
        """Samples candidates first … first + count − 1 in a separate request, with the seed of the first of them."""
        seed = self._sampling.seed
        sampling = replace(self._sampling, seed=None if seed is None else seed + first)
        await self._read(await self._generator.stream(self._prompt, sampling, count), first)

    async def _read(self, stream: Any, first: int) -> int:
        """Yields the choices of one stream as candidates `first` + choice index; returns the number of choices."""
        builders: dict[int, _ChoiceBuilder] = {}
        try:
            async with stream:
                async for chunk in stream:
                    if chunk.usage is not None:
                        self.prompt_tokens = chunk.usage.prompt_tokens
                    for choice in chunk.choices:
                        builder = builders.setdefault(
                            choice.index, _ChoiceBuilder(first + choice.index, self._sampling.logprobs is not None)
                        )
                        builder.extend(choice)
                        if (choice.finish_reason or self._stream_partial) and builder.index < self._n:
                            self._outcomes.put(builder.candidate(choice.finish_reason))
        except openai.APIError as error:
            raise _as_nbest_error(error) from error
        except ValueError:  # not chained, because its message contains the event
            raise GenerationError("The upstream server sent an event that is not JSON. Try again.") from None
        return len(builders)


@dataclass(slots=True)
class _ChoiceBuilder:
    """Adds up the deltas of one choice.

    Every request to the upstream has log-probabilities, for the token counts; the candidate has them on request only.
    """

    index: int
    return_logprobs: bool
    text: str = ""
    pieces: int = 0
    logprobs: list[TokenLogprob] = field(default_factory=list)

    def extend(self, choice: Any) -> None:
        """Adds a chunk's choice, of either endpoint."""
        chat = hasattr(choice, "delta")
        piece = (choice.delta.content if chat else choice.text) or ""
        self.text += piece
        self.pieces += bool(piece)
        if choice.logprobs is None:
            return
        if chat:
            self.logprobs += [
                TokenLogprob(entry.token, entry.logprob, tuple((top.token, top.logprob) for top in entry.top_logprobs))
                for entry in choice.logprobs.content or ()
            ]
        else:
            tokens, values = choice.logprobs.tokens or (), choice.logprobs.token_logprobs or ()
            tops = choice.logprobs.top_logprobs or [{}] * len(tokens)
            self.logprobs += [
                TokenLogprob(token, value, tuple((top or {}).items()))
                for token, value, top in zip(tokens, values, tops, strict=True)
            ]

    def candidate(self, finish_reason: str | None) -> Candidate:
        """The choice so far."""
        return Candidate(
            index=self.index,
            text=self.text,
            num_tokens=len(self.logprobs) or self.pieces,
            cumulative_logprob=math.fsum(token.logprob for token in self.logprobs) if self.logprobs else None,
            finish_reason=FINISH_REASONS.get(finish_reason, "stop") if finish_reason else None,
            logprobs=tuple(self.logprobs) if self.return_logprobs and self.logprobs else None,
        )


def _response_format(json_schema: dict[str, Any]) -> dict[str, Any]:
    if not json_schema:
        return {"type": "json_object"}
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": json_schema}}


def _as_nbest_error(error: openai.APIError) -> NbestError:
    """The upstream's error as an nbest error: a refusal is a client error, a failure of the upstream can be retried."""
    message = f"The upstream server returned an error: {error.message}"
    if isinstance(error, openai.RateLimitError):
        return OverloadedError(message, retry_after_s=_retry_after_s(error))
    if isinstance(error, openai.AuthenticationError | openai.PermissionDeniedError):
        return NotReadyError(f"{message} Check the server's api_key setting.")
    if isinstance(error, openai.BadRequestError | openai.UnprocessableEntityError):
        return BadRequestError(message)
    return GenerationError(message)


def _retry_after_s(error: openai.RateLimitError) -> float:
    try:
        return float(error.response.headers["retry-after"])
    except (KeyError, ValueError):
        return 1.0
