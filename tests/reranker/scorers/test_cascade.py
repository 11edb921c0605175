"""A cheap scorer before a dear one: what goes on, what it is worth, and what it costs, by hand."""

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


async def cascaded(cheap: ScriptedScorer, dear: ScriptedScorer, keep: float, texts: str = "abcd") -> Scores:
    candidates = [Candidate(index, text, num_tokens=1) for index, text in enumerate(texts)]
    return await CascadeScorer("both", cheap, dear, keep).score(PROMPT, candidates)


@pytest.mark.parametrize(
    ("candidates", "keep", "kept"), [(16, 4, 4), (3, 4, 3), (16, 0.25, 4), (5, 0.25, 2), (1, 0.01, 1), (100, 0.07, 7)]
)
def test_a_count_or_a_share_goes_on(candidates: int, keep: float, kept: int) -> None:
    assert kept_count(candidates, keep) == kept


def test_the_highest_go_on_ties_to_the_earlier_and_the_unscored_last() -> None:
    assert best_indices([1.0, 3.0, 3.0, 2.0], 1) == [1]
    assert best_indices([1.0, 3.0, 3.0, 2.0], 3) == [1, 2, 3]
    assert best_indices([NAN, -math.inf, 5.0], 2) == [1, 2]


async def test_the_dear_one_decides_among_what_the_cheap_one_leaves() -> None:
    cheap, dear = scripted("cheap", 1, 4, 3, 2), scripted("dear", 99, 5, 7, 98)
    found = await cascaded(cheap, dear, 2)
    assert found.rewards_N == pytest.approx((NAN, 5.0, 7.0, NAN), nan_ok=True)
    assert (cheap.groups, dear.groups) == ([4], [2])
    assert found.scored_tokens == 4 + 2


async def test_where_nothing_would_be_pruned_the_cheap_one_is_not_asked() -> None:
    cheap, dear = scripted("cheap", 1, 2), scripted("dear", 1, 2)
    assert (await cascaded(cheap, dear, 2, "ab")).rewards_N == (1.0, 2.0)
    assert cheap.groups == []


@pytest.mark.parametrize("failing", [0, 1])
async def test_if_one_fails_so_does_the_cascade(failing: int) -> None:
    cheap, dear = scripted("cheap", 1, 2), scripted("dear", 1, 2)
    (cheap, dear)[failing].fails = True
    with pytest.raises(ScoringError):
        await cascaded(cheap, dear, 1)


async def test_what_was_pruned_never_wins_and_stands_last() -> None:
    cheap, dear = scripted("cheap", 9, 8, 7), scripted("dear", -5, -4, 100)
    served = BestOfN(ScriptedGenerator(["a", "b", "c"]), {"both": CascadeScorer("both", cheap, dear, 2)})
    result = await served.run(BestOfNRequest(PROMPT, SamplingParams(), 3))
    ranking = result.selection.ranking
    assert [one.candidate.text for one in ranking] == ["b", "a", "c"]
    assert [one.reward for one in ranking] == pytest.approx([-4.0, -5.0, NAN], nan_ok=True)
