"""Stopping policies in the pipeline, over a scripted engine where equal seeds give equal texts."""

import copy
import math
from collections.abc import Sequence
from typing import Any

import pytest

from reranker.candidate import Candidate, FailedCandidate, Prompt
from reranker.reward_posterior import Prior
from reranker.scorers.base import Needs, Scores
from reranker.stopping import AdaptiveN, SpeculativeRejection, Stopping, StragglerCut
from server.errors import BadRequestError
from server.generation.base import SamplingParams
from server.pipeline.best_of_n import BestOfN
from server.pipeline.types import BestOfNRequest, BestOfNResult
from tests.support.doubles import ScriptedGeneration, ScriptedGenerator, ScriptedScorer
from tests.support.observers import RecordingObserver


class SeededTexts(ScriptedGenerator):
    """Candidate i has the text, and the delay, at the index seed + i."""

    def generate(
        self, prompt: Prompt, sampling: SamplingParams, n: int, *, stream_partial: bool = False
    ) -> ScriptedGeneration:
        self.calls.append((prompt, sampling, n))
        shifted = copy.copy(self)  # shares `cancelled` and `calls`
        first = sampling.seed or 0
        shifted.texts = [self.texts[(first + index) % len(self.texts)] for index in range(n)]
        shifted.delays_s = {index: self.delays_s[first + index] for index in range(n) if first + index in self.delays_s}
        return ScriptedGeneration(shifted, sampling, n, stream_partial)

    @property
    def waves(self) -> list[tuple[int | None, int]]:
        """The seed and the size of each wave."""
        return [(sampling.seed, n) for _, sampling, n in self.calls]


TEXTS = [f"answer {index}" for index in range(16)]


def scorer(*rewards: float) -> ScriptedScorer:
    return ScriptedScorer(dict(zip(TEXTS, rewards, strict=False)))


async def run(
    generator: ScriptedGenerator, scripted_scorer: ScriptedScorer, stopping: Stopping, best_of: int = 16, **fields: Any
) -> BestOfNResult:
    fields = {"sampling": SamplingParams(seed=0)} | fields
    request = BestOfNRequest(Prompt(text="How was it?"), best_of=best_of, stopping=stopping, **fields)
    return await BestOfN(generator, {scripted_scorer.name: scripted_scorer}).run(request)


def adaptive(most: int = 16, **options: Any) -> Stopping:
    return Stopping("adaptive", waves=AdaptiveN(most, **options))


class TestAdaptive:
    async def test_it_stops_when_one_more_candidate_is_not_worth_its_price(self) -> None:
        # One more candidate has an expected gain of 0.183 after the rewards 0, 1, 2, 1, and of 0.065 after 0, 9, 1, 2.
        generator = SeededTexts(TEXTS)
        result = await run(generator, scorer(0, 1, 2, 1, 0, 9, 1, 2), adaptive(price=0.18))
        assert generator.waves == [(0, 4), (4, 4)]
        assert (result.completed, result.cancelled, result.not_drawn) == (8, 0, 8)
        assert (result.stopped_by, result.selection.winner.candidate.index) == ("adaptive", 5)

    async def test_its_candidates_are_the_first_of_plain_best_of_n(self) -> None:
        rewards = [0.0, 1, 2, 1, 0, 9, 1, 2, 5, 6, 7, 8]
        plain = await run(SeededTexts(TEXTS), scorer(*rewards), Stopping(), best_of=12)
        stopped = await run(SeededTexts(TEXTS), scorer(*rewards), adaptive(most=12, price=0.18), best_of=12)

        def drawn(result: BestOfNResult) -> list[tuple[int, str]]:
            return sorted((scored.candidate.index, scored.candidate.text) for scored in result.selection.ranking)

        assert drawn(stopped) == drawn(plain)[:8]

    async def test_without_a_seed_no_wave_has_a_seed(self) -> None:
        generator = SeededTexts(TEXTS)
        await run(generator, scorer(0, 1, 2, 1), adaptive(most=6, price=1e-6), best_of=6, sampling=SamplingParams())
        assert generator.waves == [(None, 4), (None, 2)]

    async def test_a_request_that_draws_all_candidates_was_not_stopped_by_the_policy(self) -> None:
        result = await run(SeededTexts(TEXTS), scorer(0, 1, 2, 3, 4, 5), adaptive(most=6, price=1e-6), best_of=6)
        assert (result.completed, result.not_drawn, result.stopped_by) == (6, 0, "all")

    async def test_the_prior_is_part_of_the_decision(self) -> None:
        prior = Prior(mean=0.0, mean_weight=100, sd=1.0, sd_weight=100)
        result = await run(SeededTexts(TEXTS), scorer(0, 3, 0, 0), adaptive(price=0.01, prior=prior))
        assert (result.completed, result.stopped_by) == (4, "adaptive")

    async def test_failed_candidates_count_as_drawn(self) -> None:
        generator = SeededTexts([None, "answer 1", "answer 2", "answer 3"])
        result = await run(generator, scorer(0, 0, 1, 2), adaptive(price=0.46))
        assert (result.completed, result.failed, result.not_drawn) == (3, 1, 12)

    async def test_without_any_reward_all_candidates_are_drawn(self) -> None:
        failing = ScriptedScorer(fails=True)
        result = await run(SeededTexts(TEXTS), failing, adaptive(price=9.0), best_of=16, on_reward_failure="first")
        assert (result.completed, result.ranked_by, result.stopped_by) == (16, "first", "all")

    async def test_a_deadline_in_a_later_wave_returns_the_best_so_far(self) -> None:
        generator = SeededTexts(TEXTS, delays_s={6: 60.0})
        result = await run(generator, scorer(0, 1, 2, 1, 5, 4, 9, 3), adaptive(price=1e-6), deadline_s=0.2)
        assert (result.completed, result.cancelled, result.not_drawn) == (7, 1, 8)
        assert (result.stopped_by, result.selection.winner.candidate.index) == ("deadline", 4)

    async def test_a_scorer_that_compares_all_candidates_is_refused(self) -> None:
        comparing = ScriptedScorer()
        comparing.needs = Needs(all_candidates=True)
        with pytest.raises(BadRequestError, match="compares all of them at the end") as refused:
            await run(SeededTexts(TEXTS), comparing, adaptive(price=1.0))
        assert refused.value.param == "nbest.stopping"


class TestSpeculativeRejection:
    """Four candidates of four words; the rewards of the first two words and of two whole texts are scripted."""

    TEXTS = ("a b c d", "e f g h", "i j k l", "m n o p")
    BEGINNINGS = {"a b": 1.0, "e f": 4.0, "i j": 2.0, "m n": 3.0}  # noqa: RUF012 (it is not changed)
    WHOLE = {"e f g h": 0.0, "m n o p": 1.0}  # noqa: RUF012

    def generator(self) -> SeededTexts:
        return SeededTexts(self.TEXTS, word_delay_s=0.03)

    async def test_the_worst_half_is_cancelled_at_the_checkpoint(self) -> None:
        generator = self.generator()
        stopping = Stopping("speculative_rejection", rejection=SpeculativeRejection((2,), share=0.5))
        result = await run(generator, ScriptedScorer(self.BEGINNINGS | self.WHOLE), stopping, best_of=4)
        assert sorted(generator.cancelled) == [0, 2]
        assert [scored.candidate.index for scored in result.selection.ranking] == [3, 1]  # by the final rewards
        assert (result.completed, result.cancelled, result.not_drawn) == (2, 2, 0)
        assert result.stopped_by == "speculative_rejection"

    async def test_the_tokens_of_cancelled_candidates_are_counted(self) -> None:
        stopping = Stopping("speculative_rejection", rejection=SpeculativeRejection((2,), share=0.5))
        result = await run(self.generator(), ScriptedScorer(self.BEGINNINGS | self.WHOLE), stopping, best_of=4)
        assert 2 * 4 + 2 * 2 <= result.generated_tokens <= 2 * 4 + 2 * 3  # another word may arrive during scoring
        assert result.scored_tokens == 4 * 2 + 2 * 4

    async def test_every_checkpoint_cancels_candidates(self) -> None:
        generator = self.generator()
        rewards = self.BEGINNINGS | {"e f g": 0.0, "m n o": 1.0} | self.WHOLE
        stopping = Stopping("speculative_rejection", rejection=SpeculativeRejection((2, 3), share=0.5))
        result = await run(generator, ScriptedScorer(rewards), stopping, best_of=4)
        assert sorted(generator.cancelled) == [0, 1, 2]
        assert [scored.candidate.index for scored in result.selection.ranking] == [3]

    async def test_growing_candidates_are_not_passed_to_the_observer(self) -> None:
        observer = RecordingObserver()
        stopping = Stopping("speculative_rejection", rejection=SpeculativeRejection((2,), share=0.5))
        request = BestOfNRequest(Prompt(text="How was it?"), SamplingParams(seed=0), 4, stopping=stopping)
        scripted_scorer = ScriptedScorer(self.BEGINNINGS | self.WHOLE)
        await BestOfN(self.generator(), {scripted_scorer.name: scripted_scorer}).run(request, observer)
        assert sorted(outcome.index for outcome in observer.outcomes) == [1, 3]

    async def test_the_scorer_sees_which_candidates_are_beginnings(self) -> None:
        scorer = BeginningRecorder(self.BEGINNINGS | self.WHOLE)
        stopping = Stopping("speculative_rejection", rejection=SpeculativeRejection((2,), share=0.5))
        await run(self.generator(), scorer, stopping, best_of=4)
        assert scorer.beginnings == [True] * 4 + [False] * 2

    async def test_beginnings_without_a_reward_are_not_cancelled(self) -> None:
        rewards = dict.fromkeys(self.BEGINNINGS, math.nan) | dict.fromkeys(self.TEXTS, 1.0)
        stopping = Stopping("speculative_rejection", rejection=SpeculativeRejection((2,), share=0.5))
        result = await run(self.generator(), ScriptedScorer(rewards), stopping, best_of=4)
        assert (result.completed, result.cancelled, result.stopped_by) == (4, 0, "all")

    async def test_with_waves_each_wave_cancels_its_own_candidates(self) -> None:
        generator = self.generator()
        stopping = Stopping(
            "adaptive_rejection",
            waves=AdaptiveN(8, price=1e-9, wave=4),
            rejection=SpeculativeRejection((2,), share=0.5),
        )
        result = await run(generator, ScriptedScorer(self.BEGINNINGS | self.WHOLE), stopping, best_of=8)
        assert (result.completed, result.cancelled, result.not_drawn) == (4, 4, 0)
        assert sorted(scored.candidate.index for scored in result.selection.ranking) == [1, 3, 5, 7]
        assert result.stopped_by == "adaptive_rejection"


class BeginningRecorder(ScriptedScorer):
    """Records `is_beginning` of every candidate."""

    def __init__(self, rewards: dict[str, float]) -> None:
        super().__init__(rewards)
        self.beginnings: list[bool] = []

    async def score(self, prompt: Prompt, candidates: Sequence[Candidate]) -> Scores:
        self.beginnings += [candidate.is_beginning for candidate in candidates]
        return await super().score(prompt, candidates)


class TestStragglerCut:
    async def test_the_run_does_not_wait_for_the_last_candidates(self) -> None:
        generator = SeededTexts(TEXTS, delays_s={2: 60.0})
        stopping = Stopping("straggler_cut", stragglers=StragglerCut(share=0.75))
        result = await run(generator, scorer(0, 2, 9, 1), stopping, best_of=4)
        assert generator.cancelled == [2]
        assert (result.completed, result.cancelled, result.stopped_by) == (3, 1, "straggler_cut")
        assert result.selection.winner.candidate.index == 1

    async def test_a_reward_at_the_target_stops_the_run(self) -> None:
        generator = SeededTexts(TEXTS, delays_s={0: 60.0, 1: 60.0})
        stopping = Stopping("straggler_cut", stragglers=StragglerCut(target_reward=1.0))
        result = await run(generator, scorer(1, 1, 0, 1), stopping, best_of=4)
        assert sorted(generator.cancelled) == [0, 1]
        assert result.selection.winner.candidate.index == 3

    async def test_a_share_needs_no_rewards(self) -> None:
        generator = SeededTexts(["yes", "yes", "no", "no"], delays_s={3: 60.0})
        stopping = Stopping("straggler_cut", stragglers=StragglerCut(share=0.75))
        result = await run(generator, ScriptedScorer(fails=True), stopping, best_of=4, strategy="majority")
        assert (result.selection.winner.candidate.text, result.stopped_by) == ("yes", "straggler_cut")


class TestJsonSchema:
    SAMPLING = SamplingParams(json_schema={"type": "object", "required": ["x"]})

    async def test_a_candidate_that_stopped_and_does_not_satisfy_the_schema_has_failed(self) -> None:
        generator, observer = ScriptedGenerator(['{"x":1}', '{"y":1}', "Sure!"]), RecordingObserver()
        request = BestOfNRequest(Prompt(text="How was it?"), self.SAMPLING, 3)
        result = await BestOfN(generator, {"length": ScriptedScorer({"Sure!": 99.0})}).run(request, observer)
        assert result.selection.winner.candidate.text == '{"x":1}'
        assert (result.completed, result.failed) == (1, 2)
        reasons = {
            outcome.index: outcome.reason for outcome in observer.outcomes if isinstance(outcome, FailedCandidate)
        }
        assert reasons == {
            1: 'the text does not satisfy the JSON schema: "x" is a required property',
            2: "the text is not JSON",
        }

    async def test_an_invalid_schema_is_refused_before_anything_is_sampled(self) -> None:
        generator = ScriptedGenerator(["{}"])
        request = BestOfNRequest(Prompt(text="How was it?"), SamplingParams(json_schema={"type": "no such type"}), 3)
        with pytest.raises(BadRequestError, match="The JSON schema is invalid"):
            await BestOfN(generator, {"length": ScriptedScorer()}).run(request)
        assert generator.calls == []
