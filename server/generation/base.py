"""The generator protocol: a prompt in, N candidates out, each handed on when it finishes.

async with generator.generate(prompt, sampling, n=16) as generation:
    async for finished in generation:      # a list: all that finished since the last look
        ...
        await generation.cancel(index)     # a loser: its work stops
                                           # leaving the block cancels whatever still runs
"""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, Self

from reranker.candidate import Candidate, FailedCandidate, Prompt
from server.errors import BadRequestError

NOT_OURS = "The weights are not this server's to change; load them where the model runs."


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one candidate is drawn; the names and defaults are OpenAI's. `max_tokens` None: to the end of the context.

    Candidate i of a seeded request uses `seed + i`. `json_schema` constrains the output to a schema ({} is any JSON
    object). `logprobs` asks for that many most likely tokens beside each generated one; None for none at all. Without
    `likelihood` candidates need no `cumulative_logprob`, which over a large vocabulary is a tenth of an engine's time.

    A candidate goes on from `after`, token by token, and holds it: text, tokens and log-probabilities are those of the
    whole answer, which `max_tokens` and `stop` are about too. After `block_tokens` new ones it ends, by length.
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
        """Tokens that every candidate begins with."""
        return self.after.num_tokens if self.after else 0

    def most_new_tokens(self, room: int) -> int:
        """Tokens that may be drawn where the context has room for so many."""
        left = None if self.max_tokens is None else self.max_tokens - self.begun_tokens
        return min(limit for limit in (room, left, self.block_tokens) if limit is not None)


Outcome = Candidate | FailedCandidate


class Generation(Protocol):
    """N candidates under way. Iterate inside `async with`; leaving it cancels what still runs."""

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt; known when the iteration has ended, and with the embedded engine from the start."""

    async def __aenter__(self) -> Self:
        """Starts generating.

        Raises:
            server.errors.BadRequestError: the prompt does not fit the context, or the sampling is refused.
            server.errors.NotReadyError: the engine is not there to answer.
        """

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Cancels what still runs; returns when the engine has been told."""

    def __aiter__(self) -> AsyncIterator[list[Outcome]]:
        """Lists of candidates as they finish or fail (with `stream_partial`, also as they grow), until all have."""

    async def cancel(self, index: int) -> None:
        """Stops the work on one candidate; it will not be yielded any more. Does nothing once it has finished."""


class Generator(Protocol):
    """A policy that can be sampled."""

    @property
    def model(self) -> str:
        """The name under which the policy is served."""

    def generate(self, prompt: Prompt, sampling: SamplingParams, n: int, *, stream_partial: bool = False) -> Generation:
        """N candidates for one prompt; with `stream_partial` also as they grow (finish_reason None)."""

    async def check_ready(self) -> None:
        """Returns if a request could be answered now.

        Raises:
            server.errors.NotReadyError: with the reason.
        """

    async def load_adapter(self, path: str) -> str:
        """Serves the LoRA adapter of that directory from now on, and returns its version.

        Generations that have begun keep the weights they began with. One that cannot be loaded changes nothing.

        Raises:
            server.errors.BadRequestError: the adapter cannot be served here, with the reason.
            server.errors.NotReadyError: the engine is not there.
        """

    async def reload_weights(self, path: str) -> str:
        """Replaces all of the policy's own weights by those of that directory, and returns their version.

        Waits for the generations under way; those that begin meanwhile wait for it.

        Raises:
            server.errors.BadRequestError: these are not the weights of such a model.
            server.errors.NotReadyError: the engine is not there.
        """

    async def close(self) -> None:
        """Frees the engine."""


class FixedWeights:
    """The part of a generator whose weights are not ours to change."""

    async def load_adapter(self, path: str) -> str:
        raise BadRequestError(NOT_OURS)

    async def reload_weights(self, path: str) -> str:
        raise BadRequestError(NOT_OURS)
