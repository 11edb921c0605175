"""How a router continues when a replica dies, with scripted handles; test_ray_faults has real replicas."""

from collections.abc import Sequence
from typing import Any, Self

import pytest
from ray.exceptions import ActorDiedError

from reranker.candidate import Candidate, Prompt
from reranker.scorers.base import Needs, Scores, ScoringError
from server.distributed.clients import OutcomeGroup, RemoteGenerator, RemoteScorer
from server.distributed.failover import FailoverGenerator, ReplicatedBestOfN
from server.errors import EngineDiedError, NotReadyError
from server.generation.base import Outcome, SamplingParams
from tests.support.doubles import ScriptedScorer

REPLICA_DIED = ActorDiedError()
ENGINE_DIED = EngineDiedError("The engine has died.")
STARTED = OutcomeGroup([], 7)


def candidates(*indexes: int) -> OutcomeGroup:
    return OutcomeGroup([Candidate(index, f"text {index}", 2, finish_reason="stop") for index in indexes], 7)


class Replies:
    """The messages of one streaming call; the death of the replica is raised."""

    def __init__(self, messages: Sequence[Any]) -> None:
        self._messages = iter(messages)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Any:
        message = next(self._messages)
        if isinstance(message, ActorDiedError):
            raise message
        return message

    def cancel(self) -> None:
        """Nothing to cancel."""


class Handle:
    """A deployment's handle with scripted answers: `calls` to streaming calls, `ready` to `check_ready`."""

    def __init__(self, *calls: Sequence[Any], ready: Sequence[NotReadyError | None] = ()) -> None:
        self.calls = list(calls)
        self.ready = list(ready)
        self.cancelled: list[int] = []

    def options(self, *, method_name: str, stream: bool) -> Self:
        return self

    def remote(self, *_: Any) -> Replies:
        return Replies(self.calls.pop(0))

    def broadcast(self, method: str, request_id: str, index: int) -> Self:
        self.cancelled.append(index)
        return self

    async def results_async(self, **_: Any) -> None:
        """No replica answers a cancellation."""

    @property
    def check_ready(self) -> Self:
        return _ScriptedMethod(self.ready)  # type: ignore[return-value]


class _ScriptedMethod:
    def __init__(self, answers: list[Any]) -> None:
        self._answers = answers

    async def remote(self) -> Any:
        answer = self._answers.pop(0)
        if isinstance(answer, ActorDiedError):
            raise answer
        return answer


@pytest.fixture(autouse=True)
def no_wait_before_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.distributed.clients.RETRY_INTERVAL_S", 0)
    monkeypatch.setattr("server.distributed.failover.RETRY_INTERVAL_S", 0)


async def sample(handle: Handle, n: int = 2) -> list[Outcome]:
    generator = FailoverGenerator(RemoteGenerator(handle, "scripted"))
    async with generator.generate(Prompt(text="Well?"), SamplingParams(), n) as generation:
        return [outcome async for outcomes in generation for outcome in outcomes]


def indexes(outcomes: list[Outcome]) -> list[int]:
    return [outcome.index for outcome in outcomes]


async def test_a_replica_whose_engine_has_died_is_skipped() -> None:
    handle = Handle([ENGINE_DIED], [ENGINE_DIED], [STARTED, candidates(0, 1)])
    assert indexes(await sample(handle)) == [0, 1]


async def test_a_request_whose_replica_dies_before_the_start_is_sent_to_one_other_replica() -> None:
    assert indexes(await sample(Handle([REPLICA_DIED], [STARTED, candidates(0, 1)]))) == [0, 1]
    handle = Handle([REPLICA_DIED], [REPLICA_DIED], [STARTED, candidates(0, 1)])
    with pytest.raises(EngineDiedError, match="replica died"):
        await sample(handle)
    assert len(handle.calls) == 1, "the third replica has not been called"


@pytest.mark.parametrize("death", [REPLICA_DIED, ENGINE_DIED], ids=["replica", "engine"])
async def test_unfinished_candidates_are_sampled_again_by_the_next_replica_when_it_is_ready(death: Exception) -> None:
    readiness = [NotReadyError("starting"), ENGINE_DIED, None]
    handle = Handle([STARTED, candidates(1), death], [STARTED, candidates(0, 1)], ready=readiness)
    assert sorted(indexes(await sample(handle))) == [0, 1]
    assert handle.ready == []


async def test_a_second_death_during_a_request_is_an_error() -> None:
    handle = Handle([STARTED, REPLICA_DIED], [STARTED, REPLICA_DIED], [STARTED, candidates(0, 1)], ready=[None, None])
    with pytest.raises(EngineDiedError, match="replica died"):
        await sample(handle)
    assert len(handle.calls) == 1


async def test_the_wait_for_another_replica_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.distributed.failover.REPLACEMENT_TIMEOUT_S", 0)
    with pytest.raises(NotReadyError, match="No generator replica replaced the one that died"):
        await sample(Handle([STARTED, REPLICA_DIED], ready=[NotReadyError("starting")] * 1000))


def scorer(handle: Handle) -> RemoteScorer:
    return RemoteScorer(handle, "taste", Needs())


SCORES = Scores((1.0,), scored_tokens=2)
CANDIDATES = [Candidate(0, "text", 2, finish_reason="stop")]


@pytest.mark.parametrize(
    "first", [[REPLICA_DIED], [None, REPLICA_DIED]], ids=["before it accepted them", "while it was scoring"]
)
async def test_candidates_whose_scorer_dies_are_scored_once_more(first: list[Any]) -> None:
    assert await scorer(Handle(first, [None, SCORES])).score(Prompt(text="Well?"), CANDIDATES) == SCORES


async def test_candidates_during_which_two_scorers_die_are_a_reward_failure() -> None:
    handle = Handle([None, REPLICA_DIED], [None, REPLICA_DIED], [None, SCORES])
    with pytest.raises(ScoringError, match="two replicas died"):
        await scorer(handle).score(Prompt(text="Well?"), CANDIDATES)
    assert len(handle.calls) == 1


async def test_an_error_of_the_scorer_itself_is_not_retried() -> None:
    handle = Handle([None, ScoringError("too long")], [None, SCORES])
    with pytest.raises(ScoringError, match="too long"):
        await scorer(handle).score(Prompt(text="Well?"), CANDIDATES)
    assert len(handle.calls) == 1


async def test_a_pipeline_without_a_scorer_replica_is_not_ready() -> None:
    generator = FailoverGenerator(RemoteGenerator(Handle(ready=[None, None]), "scripted"))
    pipeline = ReplicatedBestOfN(generator, {"taste": ScriptedScorer()}, _ScriptedMethod([REPLICA_DIED, {}]).remote)
    with pytest.raises(NotReadyError, match="No scorer replica answers"):
        await pipeline.check_ready()
    await pipeline.check_ready()
