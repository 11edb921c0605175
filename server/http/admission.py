"""Load shedding, counted in candidates.

As many candidates run at once as the engine can advance; more would only share the same tokens a second. A few more may
wait their turn, first come, first served, and the rest is refused at once with the time to come back. The line is what
keeps the promise under overload: with at most half as many candidates waiting as running, an admitted request waits
about half the time that running takes, however many knock. Both sides are bounded, so memory is too.

Waiting is counted in tokens as well, since a queue of long answers drains more slowly than one of short answers. The
tokens of a request are an upper estimate from what it says: a token for every `CHARS_A_TOKEN` characters of the prompt,
once, and `max_tokens`, or `ASSUMED_MAX_TOKENS` where it is left out, for each candidate.

Two exceptions keep a request that is larger than a limit from waiting forever: one that finds nothing running starts,
and one that finds nobody waiting may wait.
"""

import asyncio
import math
import time
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Self

from reranker.candidate import Prompt
from server.config import Settings, replica_range
from server.errors import DeadlineError, OverloadedError
from server.observability.metrics import Metrics
from server.pipeline.types import BestOfNRequest

CHARS_A_TOKEN = 4
"""The usual rule of thumb for English; admission needs an order of magnitude before anything is tokenized."""
ASSUMED_MAX_TOKENS = 1024
QUEUED_TOKENS_A_CANDIDATE = 2 * ASSUMED_MAX_TOKENS
"""So that by default tokens bind only where answers or prompts are longer than usual."""
NEWEST_WEIGHT = 0.1
"""Of the newest request in the running mean of how long requests take."""
LEAST_RETRY_AFTER_S = 1.0
MOST_RETRY_AFTER_S = 60.0
"""The official client honours no longer wait than a minute in its older versions."""


def text_tokens(num_chars: int) -> int:
    """About as many tokens as a text of this length has, rounded up."""
    return -(-num_chars // CHARS_A_TOKEN)


def prompt_tokens(prompt: Prompt) -> int:
    """About as many tokens as the prompt has."""
    return text_tokens(len(prompt.text or "") + sum(len(message.content) for message in prompt.messages))


def requested_tokens(plan: BestOfNRequest) -> int:
    """The most tokens that the request may cost, by what it says."""
    return prompt_tokens(plan.prompt) + plan.best_of * (plan.sampling.max_tokens or ASSUMED_MAX_TOKENS)


@dataclass(frozen=True, slots=True)
class Limits:
    """Candidates that may run, candidates that may wait, and the tokens that those who wait may ask for."""

    running_candidates: int
    queued_candidates: int
    queued_tokens: int

    @classmethod
    def of(cls, settings: Settings) -> Self:
        running = settings.max_running_candidates or _room_of(settings)
        queued = running // 2 if settings.max_queued_candidates is None else settings.max_queued_candidates
        return cls(running, queued, settings.max_queued_tokens or queued * QUEUED_TOKENS_A_CANDIDATE)


def _room_of(settings: Settings) -> int:
    """Candidates that the engines advance at once; of several routers on Ray each has its share.

    Counted with as many engines as may be and the fewest routers: an engine more is only started under the load for it.
    """
    if not settings.ray:
        return settings.max_num_seqs
    most_engines = replica_range(settings.generator_replicas)[1]
    return math.ceil(settings.max_num_seqs * most_engines / replica_range(settings.router_replicas)[0])


@dataclass(slots=True, eq=False)
class Ticket:
    """One request in the line; `started_s` is None while it waits."""

    candidates: int
    tokens: int
    started_s: float | None = None


class AdmissionQueue:
    """The policy: who starts, who waits, who is sent away. Pure; the caller says what time it is."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._waiting: deque[Ticket] = deque()
        self._mean_service_s: float | None = None
        self.running_candidates = 0
        self.queued_candidates = 0
        self.queued_tokens = 0

    def enter(self, ticket: Ticket, now_s: float) -> None:
        """Starts the ticket if there is room, or else lets it wait.

        Raises:
            OverloadedError: as many wait already as may.
        """
        if not self._waiting and self._has_room(ticket):
            self._start(ticket, now_s)
            return
        if not self._may_wait(ticket):
            raise OverloadedError(
                f"{self.running_candidates} candidates are running and {self.queued_candidates} are waiting, and no "
                "more are taken; try again after the seconds of Retry-After, or ask for a smaller best_of.",
                retry_after_s=self._retry_after_s(ticket),
                reason="queue",
            )
        self._waiting.append(ticket)
        self.queued_candidates += ticket.candidates
        self.queued_tokens += ticket.tokens

    def leave(self, ticket: Ticket, now_s: float) -> list[Ticket]:
        """Takes the ticket out, wherever it is; those that start in its stead."""
        if ticket.started_s is None:
            self._waiting.remove(ticket)
            self._no_longer_waits(ticket)
        else:
            self.running_candidates -= ticket.candidates
            self._learn(now_s - ticket.started_s)
        started = []
        while self._waiting and self._has_room(self._waiting[0]):
            started.append(self._waiting.popleft())
            self._no_longer_waits(started[-1])
            self._start(started[-1], now_s)
        return started

    def _has_room(self, ticket: Ticket) -> bool:
        enough = self.running_candidates + ticket.candidates <= self._limits.running_candidates
        return enough or not self.running_candidates

    def _may_wait(self, ticket: Ticket) -> bool:
        if not self._waiting:
            return self._limits.queued_candidates > 0
        return (
            self.queued_candidates + ticket.candidates <= self._limits.queued_candidates
            and self.queued_tokens + ticket.tokens <= self._limits.queued_tokens
        )

    def _start(self, ticket: Ticket, now_s: float) -> None:
        ticket.started_s = now_s
        self.running_candidates += ticket.candidates

    def _no_longer_waits(self, ticket: Ticket) -> None:
        self.queued_candidates -= ticket.candidates
        self.queued_tokens -= ticket.tokens

    def _learn(self, service_s: float) -> None:
        mean_s = service_s if self._mean_service_s is None else self._mean_service_s
        self._mean_service_s = mean_s + NEWEST_WEIGHT * (service_s - mean_s)

    def _retry_after_s(self, ticket: Ticket) -> float:
        """The time in which those waiting and as many candidates as the ticket's will have drained.

        By Little's law candidates drain at running / mean time of a request, a rate that no lull before the rush
        distorts.
        """
        if not self._mean_service_s:
            return LEAST_RETRY_AFTER_S
        drain_rate_per_s = self.running_candidates / self._mean_service_s
        drained_s = (self.queued_candidates + ticket.candidates) / drain_rate_per_s
        return min(max(drained_s, LEAST_RETRY_AFTER_S), MOST_RETRY_AFTER_S)


class Admission:
    """The line for the requests of one server."""

    def __init__(self, limits: Limits, metrics: Metrics) -> None:
        self._line = AdmissionQueue(limits)
        self._turns: dict[Ticket, asyncio.Event] = {}
        self._metrics = metrics

    @asynccontextmanager
    async def turn(self, candidates: int, tokens: int, deadline_s: float | None = None) -> AsyncIterator[float]:
        """Waits until it is this request's turn, and yields the seconds of it.

        The candidates count as running until the block is left.

        Raises:
            OverloadedError: at once, where there is no room to wait.
            DeadlineError: `deadline_s` passed in waiting.
        """
        ticket = Ticket(candidates, tokens)
        arrived_s = time.perf_counter()
        self._line.enter(ticket, arrived_s)
        self._turns[ticket] = asyncio.Event()
        self._moved()
        try:
            if ticket.started_s is None:
                await self._wait(ticket, deadline_s)
            yield time.perf_counter() - arrived_s
        finally:
            del self._turns[ticket]
            for started in self._line.leave(ticket, time.perf_counter()):
                self._turns[started].set()
            self._moved()

    async def _wait(self, ticket: Ticket, deadline_s: float | None) -> None:
        deadline = asyncio.timeout(deadline_s)
        try:
            async with deadline:
                await self._turns[ticket].wait()
        except TimeoutError:
            raise DeadlineError(
                f"It was not this request's turn within deadline_s={deadline_s:g}; allow more time, or come back when "
                "the server is less busy."
            ) from None

    def _moved(self) -> None:
        line = self._line
        self._metrics.observe_admission(line.running_candidates, line.queued_candidates, line.queued_tokens)
