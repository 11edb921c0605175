"""Admission control: how many candidates run, how many wait, and when a request is refused with 429.

At most as many candidates run as the engine can advance at once: more candidates would not raise the tokens per second.
Some more candidates may wait, first come, first served. All other requests are refused at once with 429 and a
Retry-After. The limit on waiting bounds the latency under overload: with at most half as many candidates waiting as
running, an admitted request waits about half of the time that its candidates then run, however many clients there are.
Both numbers are limited, so memory is limited too.

The queue is also limited in tokens, since long answers take longer to drain than short ones. The tokens of a request
are an upper estimate from its fields: one token for every `CHARS_PER_TOKEN` characters of the prompt, counted once, and
for each candidate `max_tokens`, or `ASSUMED_MAX_TOKENS` if it is not given.

Two exceptions keep a request that is larger than a limit from being refused forever: a request always starts if nothing
is running, and a request may always wait if the queue is empty.
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

CHARS_PER_TOKEN = 4
"""The usual estimate for English text; admission needs an order of magnitude before anything is tokenized."""
ASSUMED_MAX_TOKENS = 1024
QUEUED_TOKENS_PER_CANDIDATE = 2 * ASSUMED_MAX_TOKENS
"""Default limit in tokens; it is reached before the limit in candidates only if prompts or answers are long."""
SERVICE_TIME_SMOOTHING = 0.1
"""Weight of the newest request in the running mean of the service time."""
MIN_RETRY_AFTER_S = 1.0
MAX_RETRY_AFTER_S = 60.0
"""Older versions of OpenAI's client ignore a Retry-After of more than a minute."""


def text_tokens(num_chars: int) -> int:
    """The estimated number of tokens of a text of this length, rounded up."""
    return -(-num_chars // CHARS_PER_TOKEN)


def prompt_tokens(prompt: Prompt) -> int:
    """The estimated number of tokens of the prompt."""
    return text_tokens(len(prompt.text or "") + sum(len(message.content) for message in prompt.messages))


def requested_tokens(request: BestOfNRequest) -> int:
    """The upper estimate of the tokens that the request costs: its prompt once, and all candidates."""
    return prompt_tokens(request.prompt) + request.best_of * (request.sampling.max_tokens or ASSUMED_MAX_TOKENS)


@dataclass(frozen=True, slots=True)
class Limits:
    """The maximum of running candidates, of waiting candidates, and of the tokens that waiting requests ask for."""

    running_candidates: int
    queued_candidates: int
    queued_tokens: int

    @classmethod
    def of(cls, settings: Settings) -> Self:
        running = settings.max_running_candidates or _engine_capacity(settings)
        queued = running // 2 if settings.max_queued_candidates is None else settings.max_queued_candidates
        return cls(running, queued, settings.max_queued_tokens or queued * QUEUED_TOKENS_PER_CANDIDATE)


def _engine_capacity(settings: Settings) -> int:
    """Candidates that the engines advance at once; with several routers on Ray, the share of this router.

    It assumes the most engines and the fewest routers: Ray starts more engines only under the load that fills them.
    """
    if not settings.ray:
        return settings.max_num_seqs
    max_engines = replica_range(settings.generator_replicas)[1]
    return math.ceil(settings.max_num_seqs * max_engines / replica_range(settings.router_replicas)[0])


@dataclass(slots=True, eq=False)
class Ticket:
    """One request in the admission queue; `started_s` is None while it waits."""

    candidates: int
    tokens: int
    started_s: float | None = None


class AdmissionQueue:
    """Decides which requests start, wait or are refused. It has no clock: the caller passes the time."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._waiting: deque[Ticket] = deque()
        self._mean_service_s: float | None = None
        self.running_candidates = 0
        self.queued_candidates = 0
        self.queued_tokens = 0

    def enter(self, ticket: Ticket, now_s: float) -> None:
        """Starts the ticket if there is capacity, and queues it otherwise.

        Raises:
            OverloadedError: the queue is full.
        """
        if not self._waiting and self._can_start(ticket):
            self._start(ticket, now_s)
            return
        if not self._can_wait(ticket):
            raise OverloadedError(
                f"{self.running_candidates} candidates are running and {self.queued_candidates} are waiting, and no "
                "more are accepted; try again after the seconds of Retry-After, or ask for a smaller best_of.",
                retry_after_s=self._retry_after_s(ticket),
                reason="queue",
            )
        self._waiting.append(ticket)
        self.queued_candidates += ticket.candidates
        self.queued_tokens += ticket.tokens

    def leave(self, ticket: Ticket, now_s: float) -> list[Ticket]:
        """Removes a running or waiting ticket, and returns the tickets that start because of it."""
        if ticket.started_s is None:
            self._waiting.remove(ticket)
            self._dequeue(ticket)
        else:
            self.running_candidates -= ticket.candidates
            self._update_mean_service(now_s - ticket.started_s)
        started = []
        while self._waiting and self._can_start(self._waiting[0]):
            started.append(self._waiting.popleft())
            self._dequeue(started[-1])
            self._start(started[-1], now_s)
        return started

    def _can_start(self, ticket: Ticket) -> bool:
        fits = self.running_candidates + ticket.candidates <= self._limits.running_candidates
        return fits or not self.running_candidates

    def _can_wait(self, ticket: Ticket) -> bool:
        if not self._waiting:
            return self._limits.queued_candidates > 0
        return (
            self.queued_candidates + ticket.candidates <= self._limits.queued_candidates
            and self.queued_tokens + ticket.tokens <= self._limits.queued_tokens
        )

    def _start(self, ticket: Ticket, now_s: float) -> None:
        ticket.started_s = now_s
        self.running_candidates += ticket.candidates

    def _dequeue(self, ticket: Ticket) -> None:
        self.queued_candidates -= ticket.candidates
        self.queued_tokens -= ticket.tokens

    def _update_mean_service(self, service_s: float) -> None:
        mean_s = service_s if self._mean_service_s is None else self._mean_service_s
        self._mean_service_s = mean_s + SERVICE_TIME_SMOOTHING * (service_s - mean_s)

    def _retry_after_s(self, ticket: Ticket) -> float:
        """The time in which the waiting candidates and as many more as the ticket has will have finished.

        By Little's law candidates finish at a rate of running candidates / mean service time. This rate does not depend
        on how idle the server was before the overload.
        """
        if not self._mean_service_s:
            return MIN_RETRY_AFTER_S
        drain_rate_per_s = self.running_candidates / self._mean_service_s
        drained_s = (self.queued_candidates + ticket.candidates) / drain_rate_per_s
        return min(max(drained_s, MIN_RETRY_AFTER_S), MAX_RETRY_AFTER_S)


class Admission:
    """The admission queue of one server; requests wait in it as asyncio tasks."""

    def __init__(self, limits: Limits, metrics: Metrics) -> None:
        self._queue = AdmissionQueue(limits)
        self._starts: dict[Ticket, asyncio.Event] = {}
        self._metrics = metrics

    @asynccontextmanager
    async def admitted(self, candidates: int, tokens: int, deadline_s: float | None = None) -> AsyncIterator[float]:
        """Waits until the request may start, and yields the seconds it waited.

        The candidates count as running until the block is left.

        Raises:
            OverloadedError: the queue is full; raised at once.
            DeadlineError: the request waited longer than `deadline_s`.
        """
        ticket = Ticket(candidates, tokens)
        arrived_s = time.perf_counter()
        self._queue.enter(ticket, arrived_s)
        self._starts[ticket] = asyncio.Event()
        self._update_gauges()
        try:
            if ticket.started_s is None:
                await self._wait(ticket, deadline_s)
            yield time.perf_counter() - arrived_s
        finally:
            del self._starts[ticket]
            for started in self._queue.leave(ticket, time.perf_counter()):
                self._starts[started].set()
            self._update_gauges()

    async def _wait(self, ticket: Ticket, deadline_s: float | None) -> None:
        deadline = asyncio.timeout(deadline_s)
        try:
            async with deadline:
                await self._starts[ticket].wait()
        except TimeoutError:
            raise DeadlineError(
                f"The request was not admitted within deadline_s={deadline_s:g}; allow more time, or try again when "
                "the server is less busy."
            ) from None

    def _update_gauges(self) -> None:
        queue = self._queue
        self._metrics.observe_admission(queue.running_candidates, queue.queued_candidates, queue.queued_tokens)
