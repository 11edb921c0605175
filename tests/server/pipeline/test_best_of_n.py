"""The best-of-N pipeline over scripted doubles, with few candidates and simple rewards."""

import asyncio
import itertools
import math
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from reranker.candidate import Candidate, FailedCandidate, Prompt
from reranker.scorers.base import Scores, UnscorableCandidatesError, UnscorableError
from server.errors import BadRequestError, DeadlineError, GenerationError, RewardError
from server.generation.base import Outcome, SamplingParams
from server.pipeline.best_of_n import BestOfN
from server.pipeline.strategies import SelectionOptions, Strategy
from server.pipeline.types import BestOfNRequest, BestOfNResult, RunObserver
from tests.support.doubles import ScriptedGeneration, ScriptedGenerator, ScriptedScorer
from tests.support.observers import RecordingObserver

NAN = math.nan


def request(best_of: int = 3, *, sampling: SamplingParams | None = None, **fields: Any) -> BestOfNRequest:
    return BestOfNRequest(Prompt(text="How was it?"), sampling or SamplingParams(), best_of, **fields)


def pipeline(generator: ScriptedGenerator, *scorers: ScriptedScorer) -> BestOfN:
    return BestOfN(generator, {scorer.name: scorer for scorer in scorers or (ScriptedScorer(),)})


async def test_the_highest_reward_wins() -> None:
    scorer = ScriptedScorer({"bad": -1.0, "good": 2.0, "fair": 0.5})
    result = await pipeline(ScriptedGenerator(["bad", "good", "fair"]), scorer).run(request())
    assert [scored.candidate.text for scored in result.selection.ranking] == ["good", "fair", "bad"]
    assert (result.completed, result.failed, result.cancelled) == (3, 0, 0)
    assert (result.ranked_by, result.stopped_by) == ("reward", "all")


async def test_one_failed_candidate_does_not_fail_the_request() -> None:
    scorer = ScriptedScorer({"good": 2.0, "fair": 0.5})
    result = await pipeline(ScriptedGenerator(["fair", None, "good"]), scorer).run(request())
    assert result.selection.winner.candidate.text == "good"
    assert (result.completed, result.failed, result.cancelled) == (2, 1, 0)


async def test_if_all_candidates_fail_the_error_has_the_reason() -> None:
    with pytest.raises(GenerationError, match="All 3 candidates failed: scripted failure"):
        await pipeline(ScriptedGenerator([None])).run(request())


async def test_tokens_are_counted_over_all_candidates() -> None:
    result = await pipeline(ScriptedGenerator(["one", "one two", "one two three"])).run(request())
    assert (result.prompt_tokens, result.generated_tokens, result.scored_tokens) == (7, 6, 6)


async def test_candidate_seconds_count_each_candidate_until_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that advances by one second each time it is read."""

    class StepwiseGeneration(ScriptedGeneration):
        async def __aiter__(self) -> AsyncIterator[list[Outcome]]:
            yield [Candidate(0, "early", 1, finish_reason="stop")]
            yield [FailedCandidate(1, "scripted")]
            await asyncio.Event().wait()  # the third never ends

    generator = ScriptedGenerator(["unused"])
    monkeypatch.setattr(
        generator, "generate", lambda prompt, sampling, n, **_: StepwiseGeneration(generator, sampling, n, False)
    )
    clock_s = itertools.count()
    monkeypatch.setattr("server.pipeline.sampling.time", SimpleNamespace(perf_counter=lambda: float(next(clock_s))))
    result = await pipeline(generator).run(request(deadline_s=0.05, strategy="majority"))
    # All start at 0 s; the first ends at 1 s (3 candidates x 1 s), the second at 2 s (2 x 1 s), the deadline is at 3 s.
    assert (result.completed, result.failed, result.cancelled) == (1, 1, 1)
    assert result.candidate_s == 3 + 2 + 1


async def test_a_finished_candidate_is_scored_while_others_are_generated() -> None:
    scorer = ScriptedScorer()
    generator = ScriptedGenerator(["early", "late"], delays_s={1: 0.05})
    scored_at_finish: list[int] = []

    class ScoredAtFinish(RunObserver):
        def outcome(self, outcome: Outcome) -> None:
            scored_at_finish.append(len(scorer.groups))

    await pipeline(generator, scorer).run(request(best_of=2), ScoredAtFinish())
    assert scored_at_finish == [0, 1]  # when the second ended, the first had been scored
    assert scorer.groups == [1, 1]


async def test_a_missing_reward_never_wins() -> None:
    scorer = ScriptedScorer({"unknown": NAN, "bad": -9.0})
    result = await pipeline(ScriptedGenerator(["unknown", "bad", "unknown"]), scorer).run(request())
    assert [scored.candidate.index for scored in result.selection.ranking] == [1, 0, 2]
    assert result.ranked_by == "reward"


class TestStrategies:
    """Each strategy is called with the request's options and seed, and the result says what ranked the candidates.

    tests/reranker/test_selection.py tests the formulas, and test_strategies.py `select`.
    """

    TEXTS = ("it is 4", "it is 5", "it is 5.0", "who knows")
    BY_NUMBER = SelectionOptions(answer_regex="is ([0-9.]+)")

    async def run(self, strategy: Strategy, *rewards: float, **fields: Any) -> BestOfNResult:
        scorer = ScriptedScorer(dict(zip(self.TEXTS, rewards, strict=True)))
        fields = {"selection": self.BY_NUMBER} | fields
        return await pipeline(ScriptedGenerator(self.TEXTS), scorer).run(request(4, strategy=strategy, **fields))

    async def test_majority_uses_no_reward_model(self) -> None:
        scorer = ScriptedScorer(fails=True)
        result = await pipeline(ScriptedGenerator(self.TEXTS), scorer).run(
            request(4, strategy="majority", selection=self.BY_NUMBER)
        )
        assert [scored.candidate.index for scored in result.selection.ranking] == [1, 2, 0, 3]
        assert not any(scored.has_reward for scored in result.selection.ranking)
        assert (result.strategy, result.ranked_by, result.reward_model) == ("majority", "answer", None)
        assert (result.scored_tokens, scorer.groups) == (0, [])

    async def test_majority_without_any_answer_is_ranked_by_first(self) -> None:
        result = await self.run("majority", 0, 0, 0, 9, selection=SelectionOptions(answer_regex="was ([0-9]+)"))
        assert (result.selection.winner.candidate.index, result.ranked_by) == (0, "first")

    async def test_weighted_majority(self) -> None:
        # The answer 5 has the weight 2·exp(-1) = .74 at temperature 1 and 2·exp(-1/2) = 1.21 at 2; the answer 4 has 1.
        rewards = (1.0, 0.0, 0.0, 9.0)
        result = await self.run("weighted_majority", *rewards)
        assert (result.selection.winner.candidate.index, result.ranked_by) == (0, "answer")
        result = await self.run("weighted_majority", *rewards, selection=replace(self.BY_NUMBER, temperature=2.0))
        assert (result.selection.winner.candidate.index, result.ranked_by) == (1, "answer")

    async def test_weighted_majority_without_any_answer_is_ranked_by_reward(self) -> None:
        options = SelectionOptions(answer_json_pointer="/answer")
        result = await self.run("weighted_majority", 1, 0, 0, 9, selection=options)
        assert (result.selection.winner.candidate.index, result.ranked_by) == (3, "reward")

    async def test_a_voting_strategy_uses_the_fallback_after_a_reward_failure(self) -> None:
        result = await self.run("weighted_majority", NAN, NAN, NAN, NAN, on_reward_failure="first")
        assert (result.selection.winner.candidate.index, result.ranked_by) == (0, "first")

    async def test_soft_draws_with_the_seed_of_the_request(self) -> None:
        async def winner(seed: int) -> int:
            result = await self.run("soft", 0.0, 0.0, 0.0, 0.0, sampling=SamplingParams(seed=seed))
            return result.selection.winner.candidate.index

        winners = [await winner(seed) for seed in range(20)]
        assert winners == [await winner(seed) for seed in range(20)]
        assert len(set(winners)) == 4  # 20 draws miss a winner with a probability of 1.3 %, but the seeds are fixed

    async def test_soft_without_a_seed_draws_differently_each_time(self) -> None:
        winners = {(await self.run("soft", 0, 0, 0, 0)).selection.winner.candidate.index for _ in range(60)}
        assert len(winners) > 1  # 60 equal draws have a probability of 4^-59

    async def test_mbr_prefers_a_text_that_is_similar_to_many_others(self) -> None:
        rewards = (0.0, 0.0, 0.0, 0.1)
        with_beta = await self.run("mbr", *rewards)
        without_beta = await self.run("mbr", *rewards, selection=SelectionOptions(beta=0.0))
        assert with_beta.selection.winner.candidate.index == 1
        assert without_beta.selection.winner.candidate.index == 3


class TestRewardFailure:
    """The scorer fails. Each word has a log-probability of -1 nat, so all means are equal and the index decides."""

    async def test_error_is_the_default(self) -> None:
        with pytest.raises(RewardError, match=r"the scripted scorer fails.*on_reward_failure"):
            await pipeline(ScriptedGenerator(["a"]), ScriptedScorer(fails=True)).run(request())

    @pytest.mark.parametrize("strategy", ["argmax", "weighted_majority", "blockwise"])
    async def test_a_prompt_that_the_scorer_cannot_read_is_refused_before_anything_is_drawn(
        self, strategy: Strategy
    ) -> None:
        generator, scorer = ScriptedGenerator(["a"]), ScriptedScorer(refusal=UnscorableError("no system role"))
        with pytest.raises(BadRequestError, match="cannot score this: no system role") as refusal:
            await pipeline(generator, scorer).run(request(strategy=strategy))
        assert (refusal.value.param, generator.calls) == ("prompt", [])

    @pytest.mark.parametrize("fields", [{"strategy": "majority"}, {"on_reward_failure": "first"}])
    async def test_a_request_that_can_do_without_rewards_is_answered(self, fields: dict[str, Any]) -> None:
        scorer = ScriptedScorer(refusal=UnscorableError("no system role"))
        assert (await pipeline(ScriptedGenerator(["a"]), scorer).run(request(**fields))).completed == 3

    async def test_candidates_that_are_all_too_long_for_the_scorer_are_no_reason_to_try_again(self) -> None:
        scorer = ScriptedScorer(refusal=UnscorableCandidatesError("it reads 5 tokens"))
        with pytest.raises(BadRequestError, match="it reads 5 tokens") as refusal:
            await pipeline(ScriptedGenerator(["a"]), scorer).run(request())
        assert refusal.value.param == "max_tokens"

    @pytest.mark.parametrize("policy", ["first", "logprob"])
    async def test_ranked_by_names_the_fallback(self, policy: Any) -> None:
        generator, sampling = ScriptedGenerator(["a b", "a"]), SamplingParams(likelihood=False)
        result = await pipeline(generator, ScriptedScorer(fails=True)).run(
            request(best_of=2, sampling=sampling, on_reward_failure=policy)
        )
        assert generator.calls[0][1].likelihood is (policy == "logprob")
        assert result.ranked_by == policy
        assert [scored.candidate.index for scored in result.selection.ranking] == [0, 1]
        assert not any(scored.has_reward for scored in result.selection.ranking)

    async def test_rewards_that_are_all_nan_count_as_a_failure(self) -> None:
        with pytest.raises(RewardError, match="no number for any candidate"):
            await pipeline(ScriptedGenerator(["a"]), ScriptedScorer({"a": NAN})).run(request())


class TestDeadline:
    async def test_the_best_finished_candidate_wins_and_the_rest_is_cancelled(self) -> None:
        generator = ScriptedGenerator(["fair", "good", "never"], delays_s={2: 60})
        result = await pipeline(generator, ScriptedScorer({"fair": 0.5, "good": 2.0})).run(request(deadline_s=0.2))
        assert result.selection.winner.candidate.text == "good"
        assert (result.completed, result.failed, result.cancelled) == (2, 0, 1)
        assert result.stopped_by == "deadline"
        assert generator.cancelled == [2]

    async def test_no_finished_candidate_is_an_error(self) -> None:
        generator = ScriptedGenerator(["never"], delays_s=dict.fromkeys(range(3), 60))
        with pytest.raises(DeadlineError, match=r"deadline_s=0.05"):
            await pipeline(generator).run(request(deadline_s=0.05))
        assert sorted(generator.cancelled) == [0, 1, 2]

    async def test_a_timeout_of_the_scorer_is_not_mistaken_for_the_deadline(self) -> None:
        class TimingOutScorer(ScriptedScorer):
            async def score(self, prompt: Prompt, candidates: Sequence[Candidate]) -> Scores:
                raise TimeoutError

        with pytest.raises(TimeoutError):
            await pipeline(ScriptedGenerator(["a"]), TimingOutScorer()).run(request(deadline_s=60))

    async def test_finished_candidates_without_rewards_are_ranked_by_first(self) -> None:
        scorer = ScriptedScorer(delay_s=60)
        result = await pipeline(ScriptedGenerator(["a", "b", "c"]), scorer).run(request(deadline_s=0.05))
        assert (result.ranked_by, result.stopped_by) == ("first", "deadline")
        assert result.selection.winner.candidate.text == "a"


async def test_cancelling_the_run_cancels_the_candidates() -> None:
    generator = ScriptedGenerator(["never"], delays_s=dict.fromkeys(range(3), 60))
    running = asyncio.create_task(pipeline(generator).run(request()))
    await asyncio.sleep(0.01)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert sorted(generator.cancelled) == [0, 1, 2]


async def test_a_single_candidate_is_observed_while_it_grows() -> None:
    observer = RecordingObserver(streams_partial=True)
    await pipeline(ScriptedGenerator(["a b c"])).run(request(best_of=1), observer)
    texts = [(outcome.text, outcome.finish_reason) for outcome in observer.outcomes if isinstance(outcome, Candidate)]
    assert texts == [("a", None), ("a b", None), ("a b c", "stop")]


async def test_a_request_names_its_scorer() -> None:
    second = ScriptedScorer({"a": 1.0, "b": 2.0})
    second.name = "second"
    best_of_n = pipeline(ScriptedGenerator(["a", "b"]), ScriptedScorer({"a": 9.0, "b": 0.0}), second)
    result = await best_of_n.run(request(best_of=2, reward_model="second"))
    assert (result.reward_model, result.selection.winner.candidate.text) == ("second", "b")
    with pytest.raises(BadRequestError, match="choose one of: scripted-reward, second"):
        await best_of_n.run(request(reward_model="third"))
