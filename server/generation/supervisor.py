"""Restarts the engine when it dies.

An engine is a process, and processes die: memory runs out, a kernel has a bug, an operator kills it.
`SupervisedGenerator` holds the running engine and a function that starts another, and checks the engine's health. When
the engine has died:

- `check_ready` raises, and new requests are refused with an error that is worth a retry.
- The next engine is started in the background: at once after a single death, and after increasing waits when engines
  die one after another.
- Running requests wait for the next engine and are sampled again on it, once. Finished candidates are kept, and the
  others keep their seeds. Partial text that was already streamed cannot be taken back, so its request fails with the
  same retryable error. Every request fails with it when the next start has to wait, because then the wait has no known
  length.

Deadlines and disconnects need no code here: both cancel the wait like any other work. Weights that were loaded while an
engine ran need none either: `start` loads them into the next engine, and a request that is sampled again uses them.
"""

import asyncio
import contextlib
import logging
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from reranker.candidate import FailedCandidate, Prompt
from server.errors import EngineDiedError, NbestError, NotReadyError
from server.generation.base import Generation, Generator, Outcome, SamplingParams

log = logging.getLogger("nbest")


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """When to start the next engine: exponential back-off over failures (deaths and failed starts) in a row.

    The first failure is followed by a start at once, the k-th in a row by one after `first_wait_s` · 2^(k−2), at most
    `max_wait_s`. An engine that ran for `stable_after_s` ends the row: its death counts as a first one. The health of
    an idle engine is checked every `check_interval_s`.
    """

    check_interval_s: float = 1.0
    stable_after_s: float = 60.0
    first_wait_s: float = 2.0
    max_wait_s: float = 60.0

    def wait_s(self, failures: int) -> float:
        """Seconds to wait before a start, after that many failures in a row."""
        doublings = min(failures - 2, 30)  # far beyond any limit, and still a float
        return min(self.first_wait_s * 2.0**doublings, self.max_wait_s) if failures > 1 else 0.0


class EngineSupervisor(ABC):
    """A generator over a series of engines, of which one runs at a time."""

    model: str

    @property
    @abstractmethod
    def engine(self) -> Generator:
        """The running engine.

        Raises:
            NotReadyError: no engine runs.
        """

    @abstractmethod
    async def next_engine(self, dead: Generator) -> Generator:
        """Waits for the engine that replaces `dead`, which a request has found dead.

        Raises:
            NotReadyError: no engine replaces it, or not soon.
        """

    def generate(
        self, prompt: Prompt, sampling: SamplingParams, n: int, *, stream_partial: bool = False
    ) -> "SupervisedGeneration":
        return SupervisedGeneration(self, prompt, sampling, n, stream_partial)

    async def check_ready(self) -> None:
        await self.engine.check_ready()

    async def load_adapter(self, path: str) -> str:
        return await self.engine.load_adapter(path)

    async def reload_weights(self, path: str) -> str:
        return await self.engine.reload_weights(path)


class SupervisedGenerator(EngineSupervisor):
    """Starts the next engine in this process; made by `create`."""

    def __init__(
        self,
        engine: Generator,
        start: Callable[[], Awaitable[Generator]],
        restart_policy: RestartPolicy,
        on_restart: Callable[[float], None] | None,
    ) -> None:
        self.model = engine.model
        self._engine: Generator | None = engine
        self._start = start
        self._restart_policy = restart_policy
        self._on_restart = on_restart
        self._unavailable_message = ""  # the error while no engine runs
        self._death_reported = asyncio.Event()  # a request has met a dead engine
        # Set while an engine runs, or while the next start has to wait, so that requests fail instead of waiting.
        self._can_answer = asyncio.Event()
        self._can_answer.set()
        self._watcher = asyncio.create_task(self._watch(engine))

    @classmethod
    async def create(
        cls,
        start: Callable[[], Awaitable[Generator]],
        *,
        restart_policy: RestartPolicy | None = None,
        on_restart: Callable[[float], None] | None = None,
    ) -> Self:
        """Starts the first engine; an error of that start is raised to the caller.

        `on_restart` is called after each restart with the seconds that no engine ran.
        """
        return cls(await start(), start, restart_policy or RestartPolicy(), on_restart)

    @property
    def engine(self) -> Generator:
        if self._engine is None:
            raise NotReadyError(self._unavailable_message)
        return self._engine

    async def next_engine(self, dead: Generator) -> Generator:
        if self._engine is dead:
            self._can_answer.clear()
            self._death_reported.set()
        await self._can_answer.wait()
        return self.engine

    async def close(self) -> None:
        self._watcher.cancel()
        await asyncio.gather(self._watcher, return_exceptions=True)
        engine, self._engine = self._engine, None
        self._unavailable_message = "The server is stopping; try again in a few seconds."
        self._can_answer.set()
        if engine is not None:
            await engine.close()

    async def _watch(self, engine: Generator) -> None:
        """Replaces each engine that dies, for as long as the server runs."""
        loop = asyncio.get_running_loop()
        failures = 0
        while True:
            started_s = loop.time()
            await self._until_dead(engine)
            died_s = loop.time()
            failures = 1 if died_s - started_s >= self._restart_policy.stable_after_s else failures + 1
            log.error("The engine has died; starting another.")
            engine, failures = await self._replace(engine, failures)
            if self._on_restart is not None:
                self._on_restart(loop.time() - died_s)

    async def _until_dead(self, engine: Generator) -> None:
        """Returns when this engine no longer answers: when a request reports it, or at the next health check."""
        while not self._death_reported.is_set():
            try:
                await engine.check_ready()
            except NotReadyError:
                break
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._death_reported.wait(), self._restart_policy.check_interval_s)
        self._death_reported.clear()

    async def _replace(self, dead: Generator, failures: int) -> tuple[Generator, int]:
        """Starts engines until one runs; returns it and the number of failures in a row so far."""
        self._engine = None
        self._unavailable_message = "The engine has died and is starting again; try again in a few seconds."
        self._can_answer.clear()
        try:
            await dead.close()
        except Exception:
            log.exception("The resources of the dead engine could not all be freed.")
        cause = "Engines die one after another; the reason is in the server's log."
        while True:
            wait_s = self._restart_policy.wait_s(failures)
            if wait_s:
                self._unavailable_message = (
                    f"{cause} The next start, after {failures} failures in a row, is in at most {wait_s:g} s."
                )
                self._can_answer.set()
                await asyncio.sleep(wait_s)
            try:
                self._engine = await self._start()
            except Exception as error:
                log.exception("The engine could not be started again.")
                failures += 1
                reason = error.message if isinstance(error, NbestError) else "The reason is in the server's log."
                cause = f"The engine has died and could not be started again. {reason}"
            else:
                self._can_answer.set()
                return self._engine, failures


class SupervisedGeneration:
    """N candidates that survive the death of one engine."""

    def __init__(
        self, supervisor: EngineSupervisor, prompt: Prompt, sampling: SamplingParams, n: int, stream_partial: bool
    ) -> None:
        self._supervisor = supervisor
        self._generate: Callable[[Generator], Generation] = lambda engine: engine.generate(
            prompt, sampling, n, stream_partial=stream_partial
        )
        self._ended: set[int] = set()  # finished, failed or cancelled; not sampled again
        self._has_streamed = False

    async def __aenter__(self) -> Self:
        self._engine = self._supervisor.engine
        self._generation: Generation = self._generate(self._engine)
        await self._generation.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._generation.__aexit__(kind, error, trace)

    @property
    def prompt_tokens(self) -> int:
        return self._generation.prompt_tokens

    async def __aiter__(self) -> AsyncIterator[list[Outcome]]:
        try:
            async for outcomes in self._generation:
                self._record(outcomes)
                yield outcomes
        except EngineDiedError:
            if self._has_streamed:
                raise
        else:
            return
        await self._sample_again()
        async for outcomes in self._generation:
            self._record(outcomes)
            yield outcomes

    async def cancel(self, index: int) -> None:
        self._ended.add(index)
        await self._generation.cancel(index)

    def _record(self, outcomes: list[Outcome]) -> None:
        """Remembers which candidates have ended, and whether partial text was yielded."""
        for outcome in outcomes:
            if isinstance(outcome, FailedCandidate) or outcome.finish_reason:
                self._ended.add(outcome.index)
            else:
                self._has_streamed = True

    async def _sample_again(self) -> None:
        """Samples all N candidates on the next engine and cancels those that have ended.

        A candidate's seed depends on its index, so the request must have all N.
        """
        await self._generation.__aexit__(None, None, None)
        self._engine = await self._supervisor.next_engine(self._engine)
        generation = self._generate(self._engine)
        await generation.__aenter__()
        self._generation = generation
        for index in sorted(self._ended):
            await generation.cancel(index)
