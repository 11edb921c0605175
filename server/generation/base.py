"""The generator protocol: sample N candidates for one prompt and yield each when it finishes.

async with generator.generate(prompt, sampling, n=16) as generation:
    async for outcomes in generation:      # a list: every outcome since the previous iteration
        ...
        await generation.cancel(index)     # stops the work on one candidate
                                           # leaving the block cancels every candidate that still runs
"""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, Self

from reranker.candidate import Candidate, FailedCandidate, Prompt
from server.errors import BadRequestError

FIXED_WEIGHTS_REFUSAL = "This server cannot change the weights; load them on the server that runs the model."


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one candidate is sampled; names and defaults are OpenAI's.

    `max_tokens` is the limit of the whole answer; None means up to the end of the context. Candidate i of a seeded
    request uses `seed + i`. `json_schema` constrains the output to a schema; {} allows any JSON object. `logprobs` is
    the number of most likely tokens to return beside each generated token; None returns no log-probabilities. With
    `likelihood` False a candidate needs no `cumulative_logprob`, which takes a tenth of an engine's time with a large
    vocabulary.

    `after` is a candidate to continue token by token. The new candidate contains it: text, tokens and
    log-probabilities are those of the whole answer, and `max_tokens` and `stop` apply to the whole answer. After
    `block_tokens` new tokens the candidate ends with finish_reason "length".
    """

    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None
    likelihood: bool = True
    json_schema: dict[str, Any] | None = None
    after: Candidate | None = None
    block_tokens: int | None = None

    @property
    def begun_tokens(self) -> int:
        """The number of tokens that every candidate already has at the start."""
        return self.after.num_tokens if self.after else 0

    def max_new_tokens(self, context_room: int) -> int:
        """The number of tokens that may be sampled when `context_room` more tokens fit the context."""
        remaining = None if self.max_tokens is None else self.max_tokens - self.begun_tokens
        return min(limit for limit in (context_room, remaining, self.block_tokens) if limit is not None)


Outcome = Candidate | FailedCandidate


class Generation(Protocol):
    """N candidates that are being sampled. Iterate inside `async with`; leaving it cancels what still runs."""

    @property
    def prompt_tokens(self) -> int:
        """The number of prompt tokens; known after the iteration, and with the embedded engine from the start."""

    async def __aenter__(self) -> Self:
        """Starts sampling.

        Raises:
            server.errors.BadRequestError: the prompt does not fit the context, or the sampling is refused.
            server.errors.NotReadyError: no engine is available.
        """

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Cancels what still runs; returns when the cancellation has been sent to the engine."""

    def __aiter__(self) -> AsyncIterator[list[Outcome]]:
        """Yields lists of candidates as they finish or fail, until all have.

        With `stream_partial` it also yields unfinished candidates as they grow (finish_reason None).
        """

    async def cancel(self, index: int) -> None:
        """Stops the work on one candidate, which is not yielded any more. Does nothing if it has finished."""


class Generator(Protocol):
    """A policy that can be sampled."""

    @property
    def model(self) -> str:
        """The name under which the policy is served."""

    def generate(self, prompt: Prompt, sampling: SamplingParams, n: int, *, stream_partial: bool = False) -> Generation:
        """N candidates for one prompt; `stream_partial` also yields them as they grow (finish_reason None)."""

    async def check_ready(self) -> None:
        """Returns if a request could be answered now.

        Raises:
            server.errors.NotReadyError: it could not, with the reason.
        """

    async def load_adapter(self, path: str) -> str:
        """Serves the LoRA adapter in that directory from now on, and returns its version.

        Generations that have started keep their weights. An adapter that cannot be loaded changes nothing.

        Raises:
            server.errors.BadRequestError: the adapter cannot be served, with the reason.
            server.errors.NotReadyError: no engine is available.
        """

    async def reload_weights(self, path: str) -> str:
        """Replaces all of the policy's own weights by those in that directory, and returns their version.

        Waits for running generations to end; generations that start in the meantime wait for the new weights.

        Raises:
            server.errors.BadRequestError: the directory does not hold weights for this model.
            server.errors.NotReadyError: no engine is available.
        """

    async def close(self) -> None:
        """Frees the engine."""


class FixedWeights:
    """The weight methods of a generator whose weights this server cannot change."""

    async def load_adapter(self, path: str) -> str:
        raise BadRequestError(FIXED_WEIGHTS_REFUSAL)

    async def reload_weights(self, path: str) -> str:
        raise BadRequestError(FIXED_WEIGHTS_REFUSAL)
