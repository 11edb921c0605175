"""The engine that is started anew when it dies.

An engine is a process, and processes die: memory runs out, a kernel has a bug, somebody kills it. `SupervisedGenerator`
holds the running engine and the way to start another, and watches. When the engine has died

- `check_ready` says so, and requests that come now are refused with an error that is worth a retry;
- the next one is started in the background: at once, but when engines die one after another after ever longer waits;
- requests under way wait for it and are drawn again there, once. What had finished stays, and the rest has the seeds it
  had. A candidate that was handed on while it grew cannot be taken back, so its request fails with that same error; so
  does every request when the next engine is not to come at once, for then nobody knows how long the wait would be.

Deadlines and hang-ups need nothing here: both cancel the waiting like any other work. Neither do weights that were
loaded while an engine ran: `start` gives them to the next one, and a request that is drawn again is drawn with them.
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
class Patience:
    """When to start the next engine. An engine that lived for `sound_after_s` was sound: its death is a first one.

    A first death is answered at once; the k-th in a row after `wait_s` · 2^(k−2), at most `longest_wait_s`.
    """

    watch_every_s: float = 1.0
    sound_after_s: float = 60.0
    wait_s: float = 2.0
    longest_wait_s: float = 60.0

    def before_start(self, deaths: int) -> float:
        """Seconds to wait after that many deaths and failed starts in a row."""
        doublings = min(deaths - 2, 30)  # far beyond any limit, and still a float
        return min(self.wait_s * 2.0**doublings, self.longest_wait_s) if deaths > 1 else 0.0


class EngineSupervisor(ABC):
    """A generator over engines one after another, of which one runs at a time."""

    model: str

    @property
    @abstractmethod
    def engine(self) -> Generator:
        """The one to ask now.

        Raises:
            NotReadyError: there is none.
        """

    @abstractmethod
    async def successor(self, dead: Generator) -> Generator:
        """The engine after one that a request has seen die.

        Raises:
            NotReadyError: it does not come, or not soon.
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
    """Starts the next engine itself; made by `create`."""

    def __init__(
        self,
        engine: Generator,
        start: Callable[[], Awaitable[Generator]],
        patience: Patience,
        on_restart: Callable[[float], None] | None,
    ) -> None:
        self.model = engine.model
        self._engine: Generator | None = engine
        self._start = start
        self._patience = patience
        self._on_restart = on_restart
        self._trouble = ""  # what is told while there is no engine
        self._alarm = asyncio.Event()  # a request met a dead engine
        self._settled = asyncio.Event()  # there is an engine, or one that is not to be waited for
        self._settled.set()
        self._watching = asyncio.create_task(self._watch(engine))

    @classmethod
    async def create(
        cls,
        start: Callable[[], Awaitable[Generator]],
        *,
        patience: Patience | None = None,
        on_restart: Callable[[float], None] | None = None,
    ) -> Self:
        """Starts the first engine, whose failure is the caller's; `on_restart` hears the seconds without an engine."""
        return cls(await start(), start, patience or Patience(), on_restart)

    @property
    def engine(self) -> Generator:
        if self._engine is None:
            raise NotReadyError(self._trouble)
        return self._engine

    async def successor(self, dead: Generator) -> Generator:
        if self._engine is dead:
            self._settled.clear()
            self._alarm.set()
        await self._settled.wait()
        return self.engine

    async def close(self) -> None:
        self._watching.cancel()
        await asyncio.gather(self._watching, return_exceptions=True)
        engine, self._engine = self._engine, None
        self._trouble = "The server is stopping; try again in a few seconds."
        self._settled.set()
        if engine is not None:
            await engine.close()

    async def _watch(self, engine: Generator) -> None:
        """Replaces each engine that dies, for as long as the server runs."""
        loop = asyncio.get_running_loop()
        deaths = 0
        while True:
            started_s = loop.time()
            await self._death_of(engine)
            died_s = loop.time()
            deaths = 1 if died_s - started_s >= self._patience.sound_after_s else deaths + 1
            log.error("The engine has died; another is started.")
            engine, deaths = await self._replace(engine, deaths)
            if self._on_restart is not None:
                self._on_restart(loop.time() - died_s)

    async def _death_of(self, engine: Generator) -> None:
        """Returns when this engine does not answer any more: as soon as a request meets it, else at the next look."""
        while not self._alarm.is_set():
            try:
                await engine.check_ready()
            except NotReadyError:
                break
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._alarm.wait(), self._patience.watch_every_s)
        self._alarm.clear()

    async def _replace(self, dead: Generator, deaths: int) -> tuple[Generator, int]:
        """The next engine, after however many attempts, and the deaths and failed starts in a row until then."""
        self._engine, self._trouble = None, "The engine has died and is starting again; try again in a few seconds."
        self._settled.clear()
        try:
            await dead.close()
        except Exception:
            log.exception("What the dead engine left could not all be freed.")
        told = "Engines die one after another; the reason is in the server's log."
        while True:
            wait_s = self._patience.before_start(deaths)
            if wait_s:
                self._trouble = f"{told} The next start, after {deaths} failures in a row, is in at most {wait_s:g} s."
                self._settled.set()
                await asyncio.sleep(wait_s)
            try:
                self._engine = await self._start()
            except Exception as error:
                log.exception("The engine could not be started again.")
                deaths += 1
                reason = error.message if isinstance(error, NbestError) else "The reason is in the server's log."
                told = f"The engine has died and could not be started again. {reason}"
            else:
                self._settled.set()
                return self._engine, deaths


class SupervisedGeneration:
    """N candidates that survive the death of one engine."""

    def __init__(
        self, engines: EngineSupervisor, prompt: Prompt, sampling: SamplingParams, n: int, stream_partial: bool
    ) -> None:
        self._engines = engines
        self._ask: Callable[[Generator], Generation] = lambda engine: engine.generate(
            prompt, sampling, n, stream_partial=stream_partial
        )
        self._ended: set[int] = set()  # finished, failed or cancelled: not drawn again
        self._grown = False

    async def __aenter__(self) -> Self:
        self._engine = self._engines.engine
        self._generation: Generation = self._ask(self._engine)
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
                yield self._noted(outcomes)
        except EngineDiedError:
            if self._grown:
                raise
        else:
            return
        await self._draw_again()
        async for outcomes in self._generation:
            yield self._noted(outcomes)

    async def cancel(self, index: int) -> None:
        self._ended.add(index)
        await self._generation.cancel(index)

    def _noted(self, outcomes: list[Outcome]) -> list[Outcome]:
        for one in outcomes:
            if isinstance(one, FailedCandidate) or one.finish_reason:
                self._ended.add(one.index)
            else:
                self._grown = True
        return outcomes

    async def _draw_again(self) -> None:
        """Asks the next engine for all of them, since candidate i has its seed by its number, and stops what is had."""
        await self._generation.__aexit__(None, None, None)
        self._engine = await self._engines.successor(self._engine)
        generation = self._ask(self._engine)
        await generation.__aenter__()
        self._generation = generation
        for index in sorted(self._ended):
            await generation.cancel(index)
