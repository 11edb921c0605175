"""Knockout tournaments worked out by hand, over a comparison that reads strengths off the texts."""

import asyncio
import math

import pytest

from reranker.candidate import Candidate, Prompt
from reranker.scorers.base import Scores, ScoringError
from reranker.scorers.pairwise import Comparison, PairwiseScorer
from server.generation.base import SamplingParams
from server.pipeline.best_of_n import BestOfN
from server.pipeline.types import BestOfNRequest
from tests.support.doubles import ScriptedGenerator

PROMPT = Prompt(text="It was")


class Strongest:
    """The larger number wins, an equal one is undecided; `favours_first` is added to the one shown first.

    An empty text gives no verdict, and "fails" no answer. `asked` collects the pairs, `at_once` how many were out.
    """

    def __init__(self, favours_first: float = 0.0) -> None:
        self.favours_first = favours_first
        self.asked: list[tuple[str, str]] = []
        self.out = 0
        self.most_at_once = 0

    async def __call__(self, prompt: Prompt, first: Candidate, second: Candidate) -> Comparison:
        pair = (first.text, second.text)
        self.asked.append(pair)
        self.out += 1
        self.most_at_once = max(self.most_at_once, self.out)
        await asyncio.sleep(0)
        self.out -= 1
        if "fails" in pair:
            raise ScoringError("the judge is out")
        if "" in pair:
            return Comparison(math.nan, num_tokens=10)
        lead = float(first.text) + self.favours_first - float(second.text)
        return Comparison(0.5 if lead == 0 else float(lead > 0), num_tokens=10)


async def tournament(compare: Strongest, *texts: str) -> Scores:
    candidates = [Candidate(index, text, num_tokens=1) for index, text in enumerate(texts)]
    return await PairwiseScorer("knockout", compare).score(PROMPT, candidates)


async def test_five_candidates_by_hand() -> None:
    """Round 1: 0–1 (1 wins), 2–3 (3 wins), 4 rests. Round 2: 1–3 (1 wins), 4 rests. Round 3: 1–4 (1 wins)."""
    compare = Strongest()
    scores = await tournament(compare, "1", "9", "2", "5", "3")
    assert scores.rewards_N == (0.0, 3.0, 0.0, 1.0, 2.0)
    assert len(compare.asked) == 8  # 4 matches, both orders
    assert scores.scored_tokens == 80
    assert [pair for pair in compare.asked if pair[0] < pair[1]] == [("1", "9"), ("2", "5"), ("5", "9"), ("3", "9")]


@pytest.mark.parametrize(("n", "rounds"), [(1, 0), (2, 1), (3, 2), (4, 2), (5, 3), (8, 3), (9, 4)])
async def test_the_best_wins_wherever_it_stands_in_log2_n_rounds(n: int, rounds: int) -> None:
    for best in range(n):
        compare = Strongest()
        texts = ["9" if place == best else "1" for place in range(n)]
        rewards = (await tournament(compare, *texts)).rewards_N
        assert rewards[best] == max(rewards) == rounds
        assert len(compare.asked) == 2 * (n - 1)


async def test_a_rounds_matches_are_played_at_once_in_both_orders() -> None:
    compare = Strongest()
    await tournament(compare, *"12345678")
    assert compare.most_at_once == 8


async def test_a_judge_that_favours_the_first_place_decides_nothing_by_it() -> None:
    """Between 1 and 2 the lead of 5 turns with the order, so the match is undecided; 9 wins in any place."""
    assert (await tournament(Strongest(favours_first=5), "1", "2")).rewards_N == (1.0, 0.5)
    assert (await tournament(Strongest(favours_first=5), "2", "1")).rewards_N == (1.0, 0.5)
    assert (await tournament(Strongest(favours_first=5), "1", "9")).rewards_N == (0.0, 1.0)


async def test_undecided_lets_the_lower_index_through_and_honours_the_narrow_loser() -> None:
    """0–1 undecided, 2–3 clear, 0–2 clear."""
    assert (await tournament(Strongest(), "4", "4", "3", "1")).rewards_N == (2.0, 0.5, 1.0, 0.0)


class TestNoVerdict:
    async def test_a_candidate_that_cannot_be_judged_has_no_reward_however_far_it_came(self) -> None:
        """0 has no verdict in 0–1 and goes through by index; nor has it in the final against 2."""
        rewards = (await tournament(Strongest(), "", "5", "6", "1")).rewards_N
        assert [math.isnan(reward) for reward in rewards] == [True, True, False, False]
        assert rewards[2] > rewards[3]

    async def test_an_order_that_fails_is_undecided_and_the_other_counts(self) -> None:
        class SecondOrderFails(Strongest):
            async def __call__(self, prompt: Prompt, first: Candidate, second: Candidate) -> Comparison:
                if first.index > second.index:
                    raise ScoringError("the judge is out")
                return await super().__call__(prompt, first, second)

        scores = await tournament(SecondOrderFails(), "1", "9")
        assert scores.rewards_N == (0.25, 1.0)  # 0 was thought better with (0 + .5) / 2
        assert scores.scored_tokens == 10

    async def test_none_at_all_is_an_error_with_the_reason(self) -> None:
        with pytest.raises(ScoringError, match="knockout: the judge is out"):
            await tournament(Strongest(), "fails", "fails", "fails")
        with pytest.raises(ScoringError, match="knockout: no comparison gave a verdict"):
            await tournament(Strongest(), "", "")

    async def test_a_bug_is_not_taken_for_a_missing_verdict(self) -> None:
        with pytest.raises(ValueError, match="could not convert"):
            await tournament(Strongest(), "1", "word")


async def test_the_pipeline_holds_one_tournament_over_all_that_finished() -> None:
    """Candidate 3 fails and 0 is the last to finish; the order of drawing decides who meets whom."""
    compare = Strongest()
    generator = ScriptedGenerator(["2", "5", "9", None], delays_s={0: 0.05})
    served = BestOfN(generator, {"knockout": PairwiseScorer("knockout", compare)})
    result = await served.run(BestOfNRequest(PROMPT, SamplingParams(), 4))
    assert [(one.candidate.text, one.reward) for one in result.selection.ranking] == [
        ("9", 2.0),
        ("5", 1.0),
        ("2", 0.0),
    ]
    assert (result.failed, result.scored_tokens) == (1, 40)
