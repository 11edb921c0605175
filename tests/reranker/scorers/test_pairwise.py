"""Knockout tournaments worked out by hand; the comparator reads each candidate's strength from its text."""

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
    """A comparator: the larger number wins, equal ones are undecided; `favours_first` is added to the first.

    An empty text gives no verdict, and "fails" raises an error. `pairs` collects the calls; `max_running` is the most
    calls that ran at the same time.
    """

    def __init__(self, favours_first: float = 0.0) -> None:
        self.favours_first = favours_first
        self.pairs: list[tuple[str, str]] = []
        self.running = 0
        self.max_running = 0

    async def __call__(self, prompt: Prompt, first: Candidate, second: Candidate) -> Comparison:
        pair = (first.text, second.text)
        self.pairs.append(pair)
        self.running += 1
        self.max_running = max(self.max_running, self.running)
        await asyncio.sleep(0)
        self.running -= 1
        if "fails" in pair:
            raise ScoringError("the judge is unavailable")
        if "" in pair:
            return Comparison(math.nan, num_tokens=10)
        lead = float(first.text) + self.favours_first - float(second.text)
        return Comparison(0.5 if lead == 0 else float(lead > 0), num_tokens=10)


async def tournament(compare: Strongest, *texts: str) -> Scores:
    candidates = [Candidate(index, text, num_tokens=1) for index, text in enumerate(texts)]
    return await PairwiseScorer("knockout", compare).score(PROMPT, candidates)


async def test_five_candidates_by_hand() -> None:
    """Round 1: 0–1 (1 wins), 2–3 (3 wins), 4 a bye. Round 2: 1–3 (1 wins), 4 a bye. Round 3: 1–4 (1 wins)."""
    compare = Strongest()
    scores = await tournament(compare, "1", "9", "2", "5", "3")
    assert scores.rewards_N == (0.0, 3.0, 0.0, 1.0, 2.0)
    assert len(compare.pairs) == 8  # 4 matches, both orders
    assert scores.scored_tokens == 80
    assert [pair for pair in compare.pairs if pair[0] < pair[1]] == [("1", "9"), ("2", "5"), ("5", "9"), ("3", "9")]


@pytest.mark.parametrize(("n", "rounds"), [(1, 0), (2, 1), (3, 2), (4, 2), (5, 3), (8, 3), (9, 4)])
async def test_the_best_wins_at_any_index_in_log2_n_rounds(n: int, rounds: int) -> None:
    for best in range(n):
        compare = Strongest()
        texts = ["9" if index == best else "1" for index in range(n)]
        rewards = (await tournament(compare, *texts)).rewards_N
        assert rewards[best] == max(rewards) == rounds
        assert len(compare.pairs) == 2 * (n - 1)


async def test_the_matches_of_a_round_run_concurrently_in_both_orders() -> None:
    compare = Strongest()
    await tournament(compare, *"12345678")
    assert compare.max_running == 8


async def test_a_bias_for_the_first_position_decides_no_match() -> None:
    """Between 1 and 2 the bias of 5 changes sides with the order, so the match is undecided; 9 wins in both orders."""
    assert (await tournament(Strongest(favours_first=5), "1", "2")).rewards_N == (1.0, 0.5)
    assert (await tournament(Strongest(favours_first=5), "2", "1")).rewards_N == (1.0, 0.5)
    assert (await tournament(Strongest(favours_first=5), "1", "9")).rewards_N == (0.0, 1.0)


async def test_an_undecided_match_advances_the_lower_index_and_rewards_the_loser_with_half() -> None:
    """0–1 undecided, 2–3 clear, 0–2 clear."""
    assert (await tournament(Strongest(), "4", "4", "3", "1")).rewards_N == (2.0, 0.5, 1.0, 0.0)


class TestNoVerdict:
    async def test_a_candidate_without_any_verdict_has_no_reward_however_far_it_advanced(self) -> None:
        """0 has no verdict in 0–1 and advances by its index; it has none in the final against 2 either."""
        rewards = (await tournament(Strongest(), "", "5", "6", "1")).rewards_N
        assert [math.isnan(reward) for reward in rewards] == [True, True, False, False]
        assert rewards[2] > rewards[3]

    async def test_a_failed_comparison_counts_as_undecided_and_the_other_order_counts(self) -> None:
        class SecondOrderFails(Strongest):
            async def __call__(self, prompt: Prompt, first: Candidate, second: Candidate) -> Comparison:
                if first.index > second.index:
                    raise ScoringError("the judge is unavailable")
                return await super().__call__(prompt, first, second)

        scores = await tournament(SecondOrderFails(), "1", "9")
        assert scores.rewards_N == (0.25, 1.0)  # the probability that 0 is better is (0 + .5) / 2
        assert scores.scored_tokens == 10

    async def test_no_verdict_at_all_is_an_error_with_the_reason(self) -> None:
        with pytest.raises(ScoringError, match="knockout: the judge is unavailable"):
            await tournament(Strongest(), "fails", "fails", "fails")
        with pytest.raises(ScoringError, match="knockout: no comparison gave a verdict"):
            await tournament(Strongest(), "", "")

    async def test_a_bug_in_the_comparator_is_raised(self) -> None:
        with pytest.raises(ValueError, match="could not convert"):
            await tournament(Strongest(), "1", "word")


async def test_a_request_has_one_tournament_over_all_finished_candidates() -> None:
    """Candidate 3 fails and 0 is the last to finish; the matches follow the order of the indices."""
    compare = Strongest()
    generator = ScriptedGenerator(["2", "5", "9", None], delays_s={0: 0.05})
    served = BestOfN(generator, {"knockout": PairwiseScorer("knockout", compare)})
    result = await served.run(BestOfNRequest(PROMPT, SamplingParams(), 4))
    assert [(scored.candidate.text, scored.reward) for scored in result.selection.ranking] == [
        ("9", 2.0),
        ("5", 1.0),
        ("2", 0.0),
    ]
    assert (result.failed, result.scored_tokens) == (1, 40)
