"""Cascades of a cheap and an expensive scorer: what is kept, its rewards and its cost, computed by hand."""

import math

import pytest

from reranker.candidate import Candidate, Prompt
from reranker.scorers.base import Scores, ScoringError
from reranker.scorers.cascade import CascadeScorer, best_indices, kept_count
from server.generation.base import SamplingParams
from server.pipeline.best_of_n import BestOfN
from server.pipeline.types import BestOfNRequest
from tests.reranker.scorers.test_ensemble import scripted
from tests.support.doubles import ScriptedGenerator, ScriptedScorer

PROMPT = Prompt(text="It was")
NAN = math.nan


async def cascaded(cheap: ScriptedScorer, expensive: ScriptedScorer, keep: float, texts: str = "abcd") -> Scores:
    candidates = [Candidate(index, text, num_tokens=1) for index, text in enumerate(texts)]
    return await CascadeScorer("both", cheap, expensive, keep).score(PROMPT, candidates)


@pytest.mark.parametrize(
    ("candidates", "keep", "kept"), [(16, 4, 4), (3, 4, 3), (16, 0.25, 4), (5, 0.25, 2), (1, 0.01, 1), (100, 0.07, 7)]
)
def test_keep_is_a_count_or_a_share(candidates: int, keep: float, kept: int) -> None:
    assert kept_count(candidates, keep) == kept


def test_the_best_are_kept_with_ties_to_the_earlier_and_nan_last() -> None:
    assert best_indices([1.0, 3.0, 3.0, 2.0], 1) == [1]
    assert best_indices([1.0, 3.0, 3.0, 2.0], 3) == [1, 2, 3]
    assert best_indices([NAN, -math.inf, 5.0], 2) == [1, 2]


async def test_the_expensive_scorer_decides_among_what_the_cheap_one_keeps() -> None:
    cheap, expensive = scripted("cheap", 1, 4, 3, 2), scripted("expensive", 99, 5, 7, 98)
    scores = await cascaded(cheap, expensive, 2)
    assert scores.rewards_N == pytest.approx((NAN, 5.0, 7.0, NAN), nan_ok=True)
    assert (cheap.groups, expensive.groups) == ([4], [2])
    assert scores.scored_tokens == 4 + 2


async def test_the_cheap_scorer_is_not_called_if_nothing_would_be_pruned() -> None:
    cheap, expensive = scripted("cheap", 1, 2), scripted("expensive", 1, 2)
    assert (await cascaded(cheap, expensive, 2, "ab")).rewards_N == (1.0, 2.0)
    assert cheap.groups == []


@pytest.mark.parametrize("failing", [0, 1])
async def test_the_cascade_fails_if_either_scorer_fails(failing: int) -> None:
    cheap, expensive = scripted("cheap", 1, 2), scripted("expensive", 1, 2)
    (cheap, expensive)[failing].fails = True
    with pytest.raises(ScoringError):
        await cascaded(cheap, expensive, 1)


async def test_pruned_candidates_never_win_and_rank_last() -> None:
    cheap, expensive = scripted("cheap", 9, 8, 7), scripted("expensive", -5, -4, 100)
    served = BestOfN(ScriptedGenerator(["a", "b", "c"]), {"both": CascadeScorer("both", cheap, expensive, 2)})
    result = await served.run(BestOfNRequest(PROMPT, SamplingParams(), 3))
    ranking = result.selection.ranking
    assert [scored.candidate.text for scored in ranking] == ["b", "a", "c"]
    assert [scored.reward for scored in ranking] == pytest.approx([-4.0, -5.0, NAN], nan_ok=True)
