"""Replicas behind the protocols of a generator and a scorer, so that `BestOfN` cannot tell local from remote.

A call to a replica costs milliseconds, a token less than that, so there is never a call per token. A generation is one
streaming call that carries groups: all outcomes that happened since the last group was taken. Scoring is one call for a
whole group of candidates.

An expected error (`NbestError`, `ScoringError`) travels as a value, with its fields; what a call raises is the death of
a replica, told here as an error that is worth a retry, or a bug. `server.distributed.deployments` is the other end.

A call that meets a replica's death is sent once more, to another replica or the next one: at its start by the classes
here, and in the midst of a generation by `server.distributed.failover`. Each does so only once,
so that a request which kills what answers it comes to an end.
"""

import asyncio
import logging
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from reranker.candidate import Candidate, Prompt
from reranker.scorers.base import Needs, Scorer, Scores, ScoringError
from server.distributed.weights_registry import Loaded, Record
from server.errors import BadRequestError, EngineDiedError, NbestError, NotReadyError
from server.generation.base import Outcome, SamplingParams
from server.generation.outcome_queue import OutcomeQueue
from server.generation.weight_store import Change

CHECK_TIMEOUT_S = 5
"""A replica that has not said in this time that it is ready is not; without any the call would wait for one."""
START_TIMEOUT_S = 15
"""Longest wait for a replica that takes a request: short beside an engine's start, long beside a queue of prompts."""
SCORER_TIMEOUT_S = 60
"""Longest wait for a replica that takes candidates: the work on them is done, and a scorer starts in less than that."""
RETRY_INTERVAL_S = 1
CHANGE_TIMEOUT_S = 600
"""Longest wait for replicas that change their weights, which first finish what they draw with the ones before."""

log = logging.getLogger("nbest")


@dataclass(frozen=True, slots=True)
class OutcomeGroup:
    """What a generation has to tell since its last group; the first, without outcomes, says that it has started."""

    outcomes: list[Outcome]
    prompt_tokens: int


class ReplicaLostError(EngineDiedError):
    """The replica that had the call is gone."""


class RemoteGenerator:
    """The generator protocol over the handle of the generator deployment; made by `connect`."""

    def __init__(self, handle: DeploymentHandle, model: str) -> None:
        self.model = model
        self.handle = handle

    @classmethod
    async def connect(cls, handle: DeploymentHandle) -> Self:
        """Waits for a replica."""
        return cls(handle, await _answer(handle.model.remote))

    def generate(
        self, prompt: Prompt, sampling: SamplingParams, n: int, *, stream_partial: bool = False
    ) -> "RemoteGeneration":
        return RemoteGeneration(self.handle, prompt, sampling, n, stream_partial)

    async def check_ready(self) -> None:
        refusal = await answer_soon(self.handle.check_ready.remote, "generator")
        if refusal is not None:
            raise refusal

    async def load_adapter(self, path: str) -> str:
        return await self._change("load_adapter", path)

    async def reload_weights(self, path: str) -> str:
        return await self._change("reload_weights", path)

    async def close(self) -> None:
        """Nothing is held here: the deployment ends with its application."""

    async def _change(self, change: Change, path: str) -> str:
        """Changes the weights of every replica, or of none.

        First each says what it would load, since a folder that is shared may not be. Then it is written down what is
        to be served, for replicas that come or are replaced, and each does it.
        """
        versions = set(await self._all("weights_there", change, path))
        if len(versions) > 1:
            raise BadRequestError(f"{path} is not the same on every machine; put it into a folder that they share.")
        before: Record = await self._one("record_change", change, Loaded(path, versions.pop()))
        try:
            served = await self._all("change_weights", change, path)
        except BadRequestError:
            await self._one("restore_record", before)
            raise
        return str(served[0])

    async def _one(self, method: str, *arguments: Any) -> Any:
        with gone_is(NotReadyError("No generator replica answers; try again in a few seconds.")):
            return await self.handle.options(method_name=method).remote(*arguments)

    async def _all(self, method: str, *arguments: Any) -> list[Any]:
        """What every replica answers; those that die meanwhile are replaced, and say nothing.

        Raises:
            NbestError: one of them refuses, or none is there.
        """
        told = self.handle.broadcast(method, *arguments)
        answers = await told.results_async(timeout_s=CHANGE_TIMEOUT_S, return_exceptions=True)
        for answer in answers:
            if isinstance(answer, NbestError | RayTaskError):
                raise answer
        alive = [answer for answer in answers if not isinstance(answer, BaseException)]
        if not alive:
            raise NotReadyError("No generator replica answers; try again in a few seconds.")
        return alive


class RemoteGeneration:
    """One streaming call to one replica.

    Closing the call cancels it in the replica that has it. A single candidate is cancelled by its request's id, told to
    all replicas, since only Serve knows which one has the request; the others do not know the id.
    """

    def __init__(
        self, handle: DeploymentHandle, prompt: Prompt, sampling: SamplingParams, n: int, stream_partial: bool
    ) -> None:
        self.prompt_tokens = 0
        self._handle = handle
        self._id = uuid.uuid4().hex
        self._asked = (prompt, sampling, n, stream_partial)
        self._outcomes = OutcomeQueue(n)
        self._groups: Any = None
        self._reading: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                await self._begin()
        except TimeoutError:
            raise NotReadyError("No generator replica took the request; try again in a few seconds.") from None
        self._reading = asyncio.create_task(self._read())
        return self

    async def _begin(self) -> None:
        """Returns when a replica has begun. One whose engine has died is about to be replaced: the next is asked."""
        has_lost_one = False
        while True:
            self._groups = self._handle.options(method_name="generate", stream=True).remote(self._id, *self._asked)
            try:
                await self._take_one()
            except ReplicaLostError:
                if has_lost_one:
                    raise
                has_lost_one = True
            except EngineDiedError:
                await asyncio.sleep(RETRY_INTERVAL_S)
            except BaseException:
                self._groups.cancel()
                raise
            else:
                return

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Cancels what still runs; the replica hears of it at once, nobody waits until it has."""
        if self._reading is None:
            return
        if not self._reading.done():
            self._groups.cancel()
        self._reading.cancel()
        await asyncio.gather(self._reading, return_exceptions=True)

    def __aiter__(self) -> AsyncIterator[list[Outcome]]:
        return aiter(self._outcomes)

    async def cancel(self, index: int) -> None:
        if self._outcomes.drop(index):
            told = self._handle.broadcast("cancel", self._id, index)
            await told.results_async(timeout_s=CHECK_TIMEOUT_S, return_exceptions=True)

    async def _read(self) -> None:
        try:
            while self._outcomes.expected:
                await self._take_one()
        except Exception as error:  # noqa: BLE001 (whoever iterates hears of it)
            self._outcomes.fail(error)

    async def _take_one(self) -> None:
        """Puts the outcomes of the next group among ours.

        Raises:
            NbestError: the generator refuses the request, or its replica is no longer there.
        """
        with gone_is(ReplicaLostError("The generator's replica stopped while it was answering; try again.")):
            group = await anext(self._groups)
        if isinstance(group, NbestError):
            raise group
        self.prompt_tokens = group.prompt_tokens
        for outcome in group.outcomes:
            self._outcomes.put(outcome)


class RemoteScorer:
    """The scorer protocol over the handle of the scorer deployment, whose replicas hold all scorers."""

    def __init__(self, handle: DeploymentHandle, name: str, needs: Needs) -> None:
        self.name = name
        self.needs = needs
        self._handle = handle

    async def score(self, prompt: Prompt, candidates: Sequence[Candidate]) -> Scores:
        try:
            return await self._score(prompt, candidates)
        except ReplicaLostError as error:
            log.warning("Scoring again, since %s", error.message)
        try:
            return await self._score(prompt, candidates)
        except ReplicaLostError as error:
            raise ScoringError("two replicas stopped while they were scoring") from error

    async def _score(self, prompt: Prompt, candidates: Sequence[Candidate]) -> Scores:
        """Asks one replica, which says at once that it has the call and then what the scorer says."""
        told = self._handle.options(method_name="score", stream=True).remote(self.name, prompt, candidates)
        lost = ReplicaLostError("the scorer's replica stopped while it was scoring.")
        try:
            async with asyncio.timeout(SCORER_TIMEOUT_S):
                with gone_is(lost):
                    await anext(told)
            with gone_is(lost):
                scores: Scores | ScoringError = await anext(told)
        except TimeoutError:
            told.cancel()
            raise ScoringError("no scorer replica took the candidates") from None
        except BaseException:
            told.cancel()
            raise
        if isinstance(scores, ScoringError):
            raise scores
        return scores

    async def close(self) -> None:
        """Nothing is held here: the deployment ends with its application."""


async def connect_scorers(handle: DeploymentHandle) -> dict[str, Scorer]:
    """The scorers of the deployment by name, in the order of the settings. Waits for a replica."""
    needs: dict[str, Needs] = await _answer(handle.needs.remote)
    return {name: RemoteScorer(handle, name, each) for name, each in needs.items()}


async def answer_soon(ask: Callable[[], Awaitable[Any]], deployment: str) -> Any:
    """The answer of a replica that is there now.

    Raises:
        NotReadyError: there is none.
    """
    with gone_is(NotReadyError(f"No {deployment} replica answers; try again in a few seconds.")):
        async with asyncio.timeout(CHECK_TIMEOUT_S):
            return await ask()


async def _answer(ask: Callable[[], Awaitable[Any]]) -> Any:
    """A replica's answer, however long its models load and however often it is replaced meanwhile."""
    while True:
        try:
            with gone_is(NotReadyError("a replica did not answer")):
                return await ask()
        except NotReadyError as error:
            log.warning("Asking again, since %s: %s", error, error.__cause__)
            await asyncio.sleep(RETRY_INTERVAL_S)


@contextmanager
def gone_is(told: Exception) -> Iterator[None]:
    """Where a call cannot be answered any more, since its replica is gone, `told` is raised.

    What the replica itself raises stays what it is: expected errors come as values, so it is a bug.
    """
    try:
        yield
    except RayTaskError:
        raise
    except (RayError, RayServeException, StopAsyncIteration, TimeoutError) as error:
        raise told from error
