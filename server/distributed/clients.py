"""Clients of the Ray replicas with the generator and scorer protocols, so that `BestOfN` runs unchanged on Ray.

A call to a replica takes milliseconds and a token takes less, so there is never a call per token. A generation is one
streaming call whose messages are groups: all outcomes since the previous group. Scoring is one call for a whole group
of candidates.

The replicas return expected errors (`NbestError`, `ScoringError`) as values, with their fields. An exception of a call
means that the replica died, which the clients raise as a retryable error, or that there is a bug.
`server.distributed.deployments` is the other end of the calls.

A call whose replica dies is sent once more, to another replica: by the classes here if it dies before the generation
has started or while it scores, and by `server.distributed.failover` if it dies during a generation. Each does so only
once, so that a request that kills every replica ends with an error.
"""

import asyncio
import logging
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Self

from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from reranker.candidate import Candidate, Prompt
from reranker.scorers.base import Needs, Scorer, Scores, ScoringError
from server.distributed.weights_registry import LoadedWeights, ServedWeights
from server.errors import BadRequestError, EngineDiedError, NbestError, NotReadyError
from server.generation.base import Outcome, SamplingParams
from server.generation.outcome_queue import OutcomeQueue
from server.generation.weight_store import WeightChange

CHECK_TIMEOUT_S = 5
"""A replica that does not answer in this time is not ready; without a replica the call would wait for one."""
START_TIMEOUT_S = 15
"""Longest wait for a replica to accept a request: less than an engine's start, more than a queue of prompts takes."""
SCORER_TIMEOUT_S = 60
"""Longest wait for a replica to accept candidates: they are already sampled, and a scorer starts in less time."""
RETRY_INTERVAL_S = 1
CHANGE_TIMEOUT_S = 600
"""Longest wait for replicas to change their weights; each first finishes its running generations."""

log = logging.getLogger("nbest")


@dataclass(frozen=True, slots=True)
class OutcomeGroup:
    """The outcomes of a generation since its previous group; the first group is empty and says that it has started."""

    outcomes: list[Outcome]
    prompt_tokens: int


class ReplicaLostError(EngineDiedError):
    """The replica that ran the call has died."""


class RemoteGenerator:
    """The generator protocol over the handle of the generator deployment; made by `connect`."""

    def __init__(self, handle: DeploymentHandle, model: str) -> None:
        self.model = model
        self.handle = handle

    @classmethod
    async def connect(cls, handle: DeploymentHandle) -> Self:
        """The client of this deployment; waits until a replica answers."""
        return cls(handle, await _call_until_answered(handle.model.remote))

    def generate(
        self, prompt: Prompt, sampling: SamplingParams, n: int, *, stream_partial: bool = False
    ) -> "RemoteGeneration":
        return RemoteGeneration(self.handle, prompt, sampling, n, stream_partial)

    async def check_ready(self) -> None:
        refusal = await call_ready_replica(self.handle.check_ready.remote, "generator")
        if refusal is not None:
            raise refusal

    async def load_adapter(self, path: str) -> str:
        return await self._change("load_adapter", path)

    async def reload_weights(self, path: str) -> str:
        return await self._change("reload_weights", path)

    async def close(self) -> None:
        """Nothing to free: the deployment ends with its application."""

    async def _change(self, change: WeightChange, path: str) -> str:
        """Changes the weights of every replica, or of none.

        First each replica returns the version that it would load, because a path may hold different files on different
        machines. Then the new weights are registered, for replicas that start later, and each replica loads them.
        """
        versions = set(await self._call_all("weights_version_at", change, path))
        if len(versions) > 1:
            raise BadRequestError(f"{path} is not the same on every machine; put it into a folder that they share.")
        loaded = LoadedWeights(path, versions.pop())
        previous: ServedWeights = await self._call_any("register_weights", change, loaded)
        try:
            served = await self._call_all("change_weights", change, path)
        except BadRequestError:
            await self._call_any("restore_registry", previous)
            raise
        return str(served[0])

    async def _call_any(self, method: str, *arguments: Any) -> Any:
        """Calls a method of any one replica."""
        with replica_death_as(NotReadyError("No generator replica answers; try again in a few seconds.")):
            return await self.handle.options(method_name=method).remote(*arguments)

    async def _call_all(self, method: str, *arguments: Any) -> list[Any]:
        """Calls a method of every replica; the answers of those that do not die during the call.

        Raises:
            NbestError: a replica refuses, or none answers.
        """
        responses = self.handle.broadcast(method, *arguments)
        answers = await responses.results_async(timeout_s=CHANGE_TIMEOUT_S, return_exceptions=True)
        for answer in answers:
            if isinstance(answer, NbestError | RayTaskError):
                raise answer
        successes = [answer for answer in answers if not isinstance(answer, BaseException)]
        if not successes:
            raise NotReadyError("No generator replica answers; try again in a few seconds.")
        return successes


class RemoteGeneration:
    """One streaming call to one replica.

    Closing the call cancels it in its replica. To cancel a single candidate the request's id is sent to all replicas,
    because only Serve knows which replica has the request; the others ignore an unknown id.
    """

    def __init__(
        self, handle: DeploymentHandle, prompt: Prompt, sampling: SamplingParams, n: int, stream_partial: bool
    ) -> None:
        self.prompt_tokens = 0
        self._handle = handle
        self._id = uuid.uuid4().hex
        self._request = (prompt, sampling, n, stream_partial)
        self._outcomes = OutcomeQueue(n)
        self._groups: Any = None
        self._reader: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                await self._start()
        except TimeoutError:
            raise NotReadyError("No generator replica accepted the request; try again in a few seconds.") from None
        self._reader = asyncio.create_task(self._read())
        return self

    async def _start(self) -> None:
        """Returns when a replica has started the generation.

        A replica whose engine has died is about to be replaced: the request is sent again until another accepts it.
        """
        has_lost_replica = False
        while True:
            self._groups = self._handle.options(method_name="generate", stream=True).remote(self._id, *self._request)
            try:
                await self._read_group()
            except ReplicaLostError:
                if has_lost_replica:
                    raise
                has_lost_replica = True
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
        """Cancels what still runs; the cancellation is sent at once, without waiting for the replica."""
        if self._reader is None:
            return
        if not self._reader.done():
            self._groups.cancel()
        self._reader.cancel()
        await asyncio.gather(self._reader, return_exceptions=True)

    def __aiter__(self) -> AsyncIterator[list[Outcome]]:
        return aiter(self._outcomes)

    async def cancel(self, index: int) -> None:
        if self._outcomes.drop(index):
            responses = self._handle.broadcast("cancel", self._id, index)
            await responses.results_async(timeout_s=CHECK_TIMEOUT_S, return_exceptions=True)

    async def _read(self) -> None:
        try:
            while self._outcomes.expected:
                await self._read_group()
        except Exception as error:  # noqa: BLE001 (the iteration raises it)
            self._outcomes.fail(error)

    async def _read_group(self) -> None:
        """Queues the outcomes of the next group.

        Raises:
            NbestError: the generator refuses the request, or its replica has died.
        """
        with replica_death_as(ReplicaLostError("The generator's replica died while it was answering; try again.")):
            group = await anext(self._groups)
        if isinstance(group, NbestError):
            raise group
        self.prompt_tokens = group.prompt_tokens
        for outcome in group.outcomes:
            self._outcomes.put(outcome)


class RemoteScorer:
    """The scorer protocol over the handle of the scorer deployment; each of its replicas holds all scorers."""

    def __init__(self, handle: DeploymentHandle, name: str, needs: Needs) -> None:
        self.name = name
        self.needs = needs
        self._handle = handle

    async def check(self, prompt: Prompt) -> None:
        """Without an answer the prompt counts as readable: what is lost here, scoring will report."""
        try:
            refusal = await call_ready_replica(partial(self._handle.check.remote, self.name, prompt), "scorer")
        except NotReadyError:
            return
        if refusal is not None:
            raise refusal

    async def score(self, prompt: Prompt, candidates: Sequence[Candidate]) -> Scores:
        try:
            return await self._score(prompt, candidates)
        except ReplicaLostError as error:
            log.warning("Scoring again: %s", error.message)
        try:
            return await self._score(prompt, candidates)
        except ReplicaLostError as error:
            raise ScoringError("two replicas died while they were scoring") from error

    async def _score(self, prompt: Prompt, candidates: Sequence[Candidate]) -> Scores:
        """Calls one replica, which yields None at once to accept the call, and then the scores or an error."""
        messages = self._handle.options(method_name="score", stream=True).remote(self.name, prompt, candidates)
        lost = ReplicaLostError("the scorer's replica died while it was scoring.")
        try:
            async with asyncio.timeout(SCORER_TIMEOUT_S):
                with replica_death_as(lost):
                    await anext(messages)
            with replica_death_as(lost):
                scores: Scores | ScoringError = await anext(messages)
        except TimeoutError:
            messages.cancel()
            raise ScoringError("no scorer replica accepted the candidates") from None
        except BaseException:
            messages.cancel()
            raise
        if isinstance(scores, ScoringError):
            raise scores
        return scores

    async def close(self) -> None:
        """Nothing to free: the deployment ends with its application."""


async def connect_scorers(handle: DeploymentHandle) -> dict[str, Scorer]:
    """The scorers of the deployment by name, in the order of the settings; waits until a replica answers."""
    needs_by_name: dict[str, Needs] = await _call_until_answered(handle.needs.remote)
    return {name: RemoteScorer(handle, name, needs) for name, needs in needs_by_name.items()}


async def call_ready_replica(call: Callable[[], Awaitable[Any]], deployment: str) -> Any:
    """The answer of a replica that is ready now.

    Raises:
        NotReadyError: no replica answers within `CHECK_TIMEOUT_S`.
    """
    with replica_death_as(NotReadyError(f"No {deployment} replica answers; try again in a few seconds.")):
        async with asyncio.timeout(CHECK_TIMEOUT_S):
            return await call()


async def _call_until_answered(call: Callable[[], Awaitable[Any]]) -> Any:
    """Repeats the call until a replica answers, however long its models load and however often it is replaced."""
    while True:
        try:
            with replica_death_as(NotReadyError("a replica did not answer")):
                return await call()
        except NotReadyError as error:
            log.warning("Calling again: %s: %s", error, error.__cause__)
            await asyncio.sleep(RETRY_INTERVAL_S)


@contextmanager
def replica_death_as(error: Exception) -> Iterator[None]:
    """Raises `error` where a call inside the block gets no answer because its replica died or timed out.

    An exception that the replica's own code raised passes unchanged: expected errors are values, so it is a bug.
    """
    try:
        yield
    except RayTaskError:
        raise
    except (RayError, RayServeException, StopAsyncIteration, TimeoutError) as cause:
        raise error from cause
