"""What a router does when a replica is gone, over scripted handles; test_ray_faults has real replicas."""

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

DIES = ActorDiedError()
ENGINE_DIED = EngineDiedError("The engine has died.")
BEGUN = OutcomeGroup([], 7)


def candidates(*indexes: int) -> OutcomeGroup:
    return OutcomeGroup([Candidate(index, f"text {index}", 2, finish_reason="stop") for index in indexes], 7)


class Replies:
    """One streaming call: each of its messages, raised if it is the death of the replica."""

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
        """Nothing runs."""


class Handle:
    """A deployment's handle whose streaming calls are answered by the scripts in turn, as its questions are."""

    def __init__(self, *calls: Sequence[Any], ready: Sequence[NotReadyError | None] = ()) -> None:
        self.calls = list(calls)
        self.ready = list(ready)
        self.dropped: list[int] = []

    def options(self, *, method_name: str, stream: bool) -> Self:
        return self

    def remote(self, *_: Any) -> Replies:
        return Replies(self.calls.pop(0))

    def broadcast(self, method: str, request_id: str, index: int) -> Self:
        self.dropped.append(index)
        return self

    async def results_async(self, **_: Any) -> None:
        """Nobody has anything to say."""

    @property
    def check_ready(self) -> Self:
        return _Question(self.ready)  # type: ignore[return-value]


class _Question:
    def __init__(self, answers: list[Any]) -> None:
        self._answers = answers

    async def remote(self) -> Any:
        answer = self._answers.pop(0)
        if isinstance(answer, ActorDiedError):
            raise answer
        return answer


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.distributed.clients.RETRY_INTERVAL_S", 0)
    monkeypatch.setattr("server.distributed.failover.RETRY_INTERVAL_S", 0)


async def drawn(handle: Handle, n: int = 2) -> list[Outcome]:
    generator = FailoverGenerator(RemoteGenerator(handle, "scripted"))
    async with generator.generate(Prompt(text="Well?"), SamplingParams(), n) as generation:
        return [one async for outcomes in generation for one in outcomes]


def indexes(outcomes: list[Outcome]) -> list[int]:
    return [one.index for one in outcomes]


async def test_a_replica_whose_engine_has_died_is_passed_over() -> None:
    handle = Handle([ENGINE_DIED], [ENGINE_DIED], [BEGUN, candidates(0, 1)])
    assert indexes(await drawn(handle)) == [0, 1]


async def test_a_replica_that_dies_before_it_has_begun_is_replaced_by_one_other() -> None:
    assert indexes(await drawn(Handle([DIES], [BEGUN, candidates(0, 1)]))) == [0, 1]
    handle = Handle([DIES], [DIES], [BEGUN, candidates(0, 1)])
    with pytest.raises(EngineDiedError, match="replica stopped"):
        await drawn(handle)
    assert len(handle.calls) == 1, "it has not been asked"


@pytest.mark.parametrize("death", [DIES, ENGINE_DIED], ids=["replica", "engine"])
async def test_what_had_not_finished_is_drawn_again_by_the_next_when_that_is_ready(death: Exception) -> None:
    looks = [NotReadyError("starting"), ENGINE_DIED, None]
    handle = Handle([BEGUN, candidates(1), death], [BEGUN, candidates(0, 1)], ready=looks)
    assert sorted(indexes(await drawn(handle))) == [0, 1]
    assert handle.ready == []


async def test_a_second_death_under_a_request_is_told() -> None:
    handle = Handle([BEGUN, DIES], [BEGUN, DIES], [BEGUN, candidates(0, 1)], ready=[None, None])
    with pytest.raises(EngineDiedError, match="replica stopped"):
        await drawn(handle)
    assert len(handle.calls) == 1


async def test_a_replica_that_never_comes_is_not_waited_for_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.distributed.failover.SUCCESSOR_TIMEOUT_S", 0)
    with pytest.raises(NotReadyError, match="No generator replica took the place"):
        await drawn(Handle([BEGUN, DIES], ready=[NotReadyError("starting")] * 1000))


def scorer(handle: Handle) -> RemoteScorer:
    return RemoteScorer(handle, "taste", Needs())


SCORES = Scores((1.0,), scored_tokens=2)
CANDIDATES = [Candidate(0, "text", 2, finish_reason="stop")]


@pytest.mark.parametrize("first", [[DIES], [None, DIES]], ids=["before it had them", "while it was scoring"])
async def test_candidates_whose_scorer_dies_are_scored_once_more(first: list[Any]) -> None:
    assert await scorer(Handle(first, [None, SCORES])).score(Prompt(text="Well?"), CANDIDATES) == SCORES


async def test_candidates_under_which_two_scorers_die_are_a_reward_failure() -> None:
    handle = Handle([None, DIES], [None, DIES], [None, SCORES])
    with pytest.raises(ScoringError, match="two replicas stopped"):
        await scorer(handle).score(Prompt(text="Well?"), CANDIDATES)
    assert len(handle.calls) == 1


async def test_what_the_scorer_itself_refuses_is_not_asked_again() -> None:
    handle = Handle([None, ScoringError("too long")], [None, SCORES])
    with pytest.raises(ScoringError, match="too long"):
        await scorer(handle).score(Prompt(text="Well?"), CANDIDATES)
    assert len(handle.calls) == 1


async def test_a_pipeline_without_a_scorer_replica_is_not_ready() -> None:
    generator = FailoverGenerator(RemoteGenerator(Handle(ready=[None, None]), "scripted"))
    served = ReplicatedBestOfN(generator, {"taste": ScriptedScorer()}, _Question([DIES, {}]).remote)
    with pytest.raises(NotReadyError, match="No scorer replica answers"):
        await served.check_ready()
    await served.check_ready()
