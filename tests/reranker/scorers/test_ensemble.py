"""Ensembles of scripted scorers, with numbers computed by hand."""

import math
from typing import Any

import pytest

from reranker.candidate import Candidate, Prompt
from reranker.scorers.base import Needs, Scorer, Scores, ScoringError, UnscorableError
from reranker.scorers.ensemble import EnsembleScorer, standardised
from server.generation.base import SamplingParams
from server.pipeline.best_of_n import BestOfN
from server.pipeline.types import BestOfNRequest
from tests.support.doubles import ScriptedGenerator, ScriptedScorer

PROMPT = Prompt(text="It was")
NAN = math.nan
ROOT = math.sqrt(1.5)
"""1, 2, 3 have mean 2 and standard deviation √(2/3), so standardised they are minus ROOT, 0 and ROOT."""


def scripted(name: str, *rewards: float) -> ScriptedScorer:
    """A scorer with these rewards for the texts a, b, c and so on."""
    scorer = ScriptedScorer(dict(zip("abcdef", rewards, strict=False)))
    scorer.name = name
    return scorer


async def combined(combination: Any, *members: Scorer, k: float = 0.0, texts: str = "abc") -> Scores:
    ensemble = EnsembleScorer("both", members, combination, k)
    return await ensemble.score(PROMPT, [Candidate(index, text, num_tokens=1) for index, text in enumerate(texts)])


def test_standardised_worked_by_hand() -> None:
    assert standardised([1, 2, 3]) == pytest.approx([-ROOT, 0.0, ROOT])
    assert standardised([10, 10]) == [0.0, 0.0]
    assert standardised([7.0]) == [0.0]
    assert standardised([1, NAN, 3]) == pytest.approx([-1.0, NAN, 1.0], nan_ok=True)
    assert standardised([1, math.inf, 3]) == pytest.approx([-1.0, NAN, 1.0], nan_ok=True)
    assert standardised([NAN]) == pytest.approx([NAN], nan_ok=True)


class TestByHand:
    """Standardised, with r = √1.5, the rewards are (−r, 0, r) of the first member and (0, r, −r) of the second."""

    first = scripted("first", 1, 2, 3)
    second = scripted("second", 20, 30, 10)

    async def test_mean(self) -> None:
        rewards = (await combined("mean", self.first, self.second)).rewards_N
        assert rewards == pytest.approx((-ROOT / 2, ROOT / 2, 0.0))

    async def test_min(self) -> None:
        rewards = (await combined("min", self.first, self.second)).rewards_N
        assert rewards == pytest.approx((-ROOT, 0.0, -ROOT))

    async def test_mean_minus_k_deviations(self) -> None:
        """The members' standard deviations are r/2, r/2, r: they disagree most about c."""
        rewards = (await combined("mean-std", self.first, self.second, k=0.5)).rewards_N
        assert rewards == pytest.approx((-0.75 * ROOT, 0.25 * ROOT, -0.5 * ROOT))

    async def test_k_zero_is_the_mean(self) -> None:
        mean = await combined("mean", self.first, self.second)
        assert (await combined("mean-std", self.first, self.second)).rewards_N == mean.rewards_N


async def test_the_widest_scale_does_not_decide_alone() -> None:
    """Two members prefer a by a tenth, one prefers c by a hundred; the ensemble prefers a."""
    narrow, wide = scripted("narrow", 0.3, 0.2, 0.1), scripted("wide", 0, 50, 100)
    rewards = (await combined("mean", narrow, scripted("other", 0.3, 0.2, 0.1), wide)).rewards_N
    assert max(rewards) == rewards[0]


async def test_a_candidate_that_one_member_overrates_loses_in_the_ensemble() -> None:
    """One member rates c highest by far, the other two rate it lowest."""
    fooled, second, third = scripted("1", 1, 2, 9), scripted("2", 2, 3, 0), scripted("3", 1, 3, 0)
    alone = (await fooled.score(PROMPT, [Candidate(i, t, num_tokens=1) for i, t in enumerate("abc")])).rewards_N
    assert max(alone) == alone[2]
    for combination, k in (("min", 0.0), ("mean-std", 1.0)):
        rewards = (await combined(combination, fooled, second, third, k=k)).rewards_N
        assert max(rewards) == rewards[1], combination


async def test_the_tokens_of_all_members_are_counted() -> None:
    assert (await combined("mean", scripted("1", 1, 2, 3), scripted("2", 1, 2, 3))).scored_tokens == 6


async def test_members_score_concurrently() -> None:
    members = [ScriptedScorer(delay_s=0.3) for _ in range(5)]
    ensemble = EnsembleScorer("all", members, "mean")
    result = await BestOfN(ScriptedGenerator(["a", "bb"]), {"all": ensemble}).run(
        BestOfNRequest(PROMPT, SamplingParams(), 2)
    )
    assert result.timings.score < 0.9  # sequentially they would take 1.5 s
    assert result.selection.winner.candidate.text == "bb"
    assert [member.groups for member in members] == [[2]] * 5


class TestMissing:
    async def test_a_candidate_that_one_member_could_not_score_has_no_reward(self) -> None:
        rewards = (await combined("mean", scripted("1", 1, NAN, 3), scripted("2", 1, 2, 3))).rewards_N
        assert math.isnan(rewards[1])
        assert rewards[0] < 0 < rewards[2]

    async def test_the_ensemble_fails_with_a_member_and_names_it(self) -> None:
        broken = ScriptedScorer(fails=True)
        with pytest.raises(ScoringError, match="both: its member scripted-reward failed: the scripted scorer fails"):
            await combined("mean", scripted("1", 1, 2, 3), broken)

    async def test_a_prompt_that_one_member_cannot_read_is_refused_by_the_ensemble(self) -> None:
        refusing = ScriptedScorer(refusal=UnscorableError("no system role"))
        ensemble = EnsembleScorer("both", [scripted("1", 1, 2, 3), refusing], "mean")
        with pytest.raises(UnscorableError, match="no system role"):
            await ensemble.check(PROMPT)
        with pytest.raises(UnscorableError, match="both: its member scripted-reward failed: no system role"):
            await combined("mean", scripted("1", 1, 2, 3), refusing)

    async def test_a_bug_in_a_member_is_raised(self) -> None:
        class Broken(ScriptedScorer):
            async def score(self, *args: Any) -> Any:
                raise RuntimeError("a bug")

        with pytest.raises(RuntimeError, match="a bug"):
            await combined("mean", scripted("1", 1, 2, 3), Broken())


def test_an_ensemble_needs_all_candidates_and_what_its_members_need() -> None:
    sure, plain = ScriptedScorer(), ScriptedScorer()
    sure.needs = Needs(top_logprobs=20)
    assert EnsembleScorer("both", [plain, sure], "min").needs == Needs(all_candidates=True, top_logprobs=20)
    sure.needs = Needs(likelihood=True)
    assert EnsembleScorer("both", [plain, sure], "min").needs == Needs(all_candidates=True, likelihood=True)
