"""`select` over a few candidates whose order is worked out by hand, and the requests that docs/selection.md shows."""

import json
import math
import re
from collections import Counter
from typing import get_args

import pytest

from reranker.candidate import Candidate, ScoredCandidate, Selection
from server.config import Settings
from server.errors import BadRequestError
from server.pipeline.strategies import SelectionOptions, Strategy, select
from server.schemas.options import OPTIONS_OF
from server.schemas.requests import ChatCompletionRequest
from tests.support.paths import ROOT

NAN = math.nan
DEFAULTS = SelectionOptions()
BY_NUMBER = SelectionOptions(answer_regex="is ([0-9.]+)")
NUMBERS = ("it is 4", "it is 5", "it is 5.0", "who knows")
"""One vote for 4 and two votes for 5; the last text has no answer to `BY_NUMBER`."""


def scored(texts: tuple[str, ...], rewards: tuple[float, ...]) -> list[ScoredCandidate]:
    return [
        ScoredCandidate(Candidate(index, text, num_tokens=3), reward)
        for index, (text, reward) in enumerate(zip(texts, rewards, strict=True))
    ]


def order(selection: Selection) -> list[int]:
    return [candidate.candidate.index for candidate in selection.ranking]


@pytest.mark.parametrize("strategy", get_args(Strategy))
def test_every_strategy_ranks_all_candidates(strategy: Strategy) -> None:
    ranking, _ = select(strategy, DEFAULTS, scored(NUMBERS, (1.0, NAN, 3.0, 2.0)), seed=0)
    assert sorted(order(ranking)) == [0, 1, 2, 3]


@pytest.mark.parametrize("strategy", ["argmax", "blockwise"])
def test_argmax_and_blockwise_rank_by_reward(strategy: Strategy) -> None:
    ranking, ranked_by = select(strategy, BY_NUMBER, scored(NUMBERS, (1.0, 3.0, NAN, 3.0)), seed=0)
    assert (order(ranking), ranked_by) == ([1, 3, 0, 2], "reward")


class TestMajority:
    NO_REWARDS = (NAN, NAN, NAN, NAN)

    @pytest.mark.parametrize(
        ("texts", "options", "expected"),
        [
            pytest.param(NUMBERS, BY_NUMBER, [1, 2, 0, 3], id="regex: 5 and 5.0 are equal, no answer is last"),
            pytest.param(
                ('{"stars": 4}', '{"stars": 5}', '{"stars": 5.0}', "five stars"),
                SelectionOptions(answer_json_pointer="/stars"),
                [1, 2, 0, 3],
                id="pointer: a text that is not JSON has no answer",
            ),
            pytest.param(NUMBERS, DEFAULTS, [0, 1, 2, 3], id="the whole texts all differ: one vote each"),
            pytest.param(("no", "yes", "maybe", "Yes."), DEFAULTS, [1, 3, 0, 2], id="whole text: yes has two votes"),
        ],
    )
    def test_the_answer_with_most_votes_is_first(
        self, texts: tuple[str, ...], options: SelectionOptions, expected: list[int]
    ) -> None:
        ranking, ranked_by = select("majority", options, scored(texts, self.NO_REWARDS), seed=0)
        assert (order(ranking), ranked_by) == (expected, "answer")

    def test_without_any_answer_the_order_of_drawing_decides(self) -> None:
        options = SelectionOptions(answer_regex="was ([0-9]+)")
        ranking, ranked_by = select("majority", options, scored(NUMBERS, self.NO_REWARDS), seed=0)
        assert (order(ranking), ranked_by) == ([0, 1, 2, 3], "first")


class TestWeightedMajority:
    @pytest.mark.parametrize(
        ("temperature", "expected"),
        [
            pytest.param(1.0, [0, 1, 2, 3], id="5 weighs 2·exp(-1) = 0.74, less than 4 with 1"),
            pytest.param(2.0, [1, 2, 0, 3], id="5 weighs 2·exp(-1/2) = 1.21, more than 4 with 1"),
        ],
    )
    def test_the_answer_with_the_greatest_weight_is_first(self, temperature: float, expected: list[int]) -> None:
        """The candidate of the highest reward has no answer, so it is last."""
        options = SelectionOptions(answer_regex=BY_NUMBER.answer_regex, temperature=temperature)
        ranking, ranked_by = select("weighted_majority", options, scored(NUMBERS, (1.0, 0.0, 0.0, 9.0)), seed=0)
        assert (order(ranking), ranked_by) == (expected, "answer")

    def test_a_candidate_without_a_reward_has_no_vote(self) -> None:
        """The answer 4 weighs 1 and 5 weighs exp(-0.1) = 0.90; a second vote for 5 would make it win."""
        ranking, ranked_by = select("weighted_majority", BY_NUMBER, scored(NUMBERS, (1.0, NAN, 0.9, 0.0)), seed=0)
        assert (order(ranking), ranked_by) == ([0, 2, 3, 1], "answer")

    @pytest.mark.parametrize(
        ("options", "rewards", "expected"),
        [
            pytest.param(
                SelectionOptions(answer_json_pointer="/a"), (1.0, 0.0, 0.5, 9.0), [3, 0, 2, 1], id="no answer"
            ),
            pytest.param(BY_NUMBER, (NAN, NAN, NAN, 9.0), [3, 0, 1, 2], id="only without reward"),
        ],
    )
    def test_without_any_vote_the_reward_decides(
        self, options: SelectionOptions, rewards: tuple[float, ...], expected: list[int]
    ) -> None:
        ranking, ranked_by = select("weighted_majority", options, scored(NUMBERS, rewards), seed=0)
        assert (order(ranking), ranked_by) == (expected, "reward")


class TestSoft:
    POOL = scored(("a", "b"), (0.0, math.log(3)))

    @pytest.mark.parametrize(
        ("temperature", "share"),
        [pytest.param(1.0, 3 / 4, id="weights 1 and 3"), pytest.param(0.5, 9 / 10, id="weights 1 and 9")],
    )
    def test_the_winner_is_drawn_at_the_temperature(self, temperature: float, share: float) -> None:
        """P(i) ∝ exp(r_i / temperature). Over 2,000 fixed seeds the standard error of the share is at most 0.01."""
        options = SelectionOptions(temperature=temperature)
        selections = [select("soft", options, self.POOL, seed) for seed in range(2000)]
        winners = Counter(ranking.winner.candidate.index for ranking, _ in selections)
        assert winners[1] / 2000 == pytest.approx(share, abs=0.03)
        assert {ranked_by for _, ranked_by in selections} == {"reward"}

    def test_the_seed_decides_the_draw(self) -> None:
        first, second = ([order(select("soft", DEFAULTS, self.POOL, seed)[0]) for seed in range(20)] for _ in range(2))
        assert first == second

    def test_without_a_seed_each_call_draws_anew(self) -> None:
        winners = {select("soft", DEFAULTS, self.POOL, None)[0].winner.candidate.index for _ in range(200)}
        assert winners == {0, 1}  # 200 draws miss a candidate with a probability of (3/4)^200


@pytest.mark.parametrize(
    ("beta", "expected"),
    [
        pytest.param(1.0, [0, 1, 2], id="1 + 1/2 is more than 1.1 + 1/3"),
        pytest.param(0.5, [2, 0, 1], id="1 + 1/4 is less than 1.1 + 1/6"),
    ],
)
def test_mbr_adds_beta_times_the_mean_similarity_to_the_reward(beta: float, expected: list[int]) -> None:
    """abcd and abce share one trigram of two (similarity 1/2), and xyz is similar to itself alone.

    So the mean similarities to the three texts are 1/2, 1/2 and 1/3.
    """
    pool = scored(("abcd", "abce", "xyz"), (1.0, 1.0, 1.1))
    ranking, ranked_by = select("mbr", SelectionOptions(beta=beta), pool, seed=0)
    assert (order(ranking), ranked_by) == (expected, "reward")


@pytest.mark.parametrize("strategy", ["majority", "weighted_majority"])
@pytest.mark.parametrize(
    ("options", "param"),
    [
        (SelectionOptions(answer_regex="no group"), "nbest.selection.answer_regex"),
        (SelectionOptions(answer_json_pointer="no slash"), "nbest.selection.answer_json_pointer"),
    ],
)
def test_an_invalid_pattern_or_pointer_is_refused_by_name(
    strategy: Strategy, options: SelectionOptions, param: str
) -> None:
    with pytest.raises(BadRequestError, match=re.escape(param)) as refused:
        select(strategy, options, scored(NUMBERS, (1.0, 2.0, 3.0, 4.0)), seed=0)
    assert refused.value.param == param


PAGE = (ROOT / "docs" / "selection.md").read_text()
SECTIONS = {section.partition("\n")[0]: section for section in PAGE.split("\n## ")[1:]}


@pytest.mark.parametrize("strategy", get_args(Strategy))
def test_the_page_has_valid_requests_for_every_strategy(strategy: Strategy) -> None:
    examples = re.findall(r"^```json\n(.*?)^```", SECTIONS[strategy], re.MULTILINE | re.DOTALL)
    assert examples
    for example in examples:
        request = ChatCompletionRequest.model_validate(json.loads(example)).to_request(Settings())
        assert request.strategy == strategy
        assert (request.selection == SelectionOptions()) == (not OPTIONS_OF[strategy])


@pytest.mark.parametrize("text", ["17 · 23 = 391.\nThe answer is 391.", "The answer is 391", "The answer is 391.\n"])
def test_the_pattern_on_the_page_extracts_the_answer(text: str) -> None:
    (pattern,) = {json.loads(f'"{escaped}"') for escaped in re.findall(r'"answer_regex": "(.*?)"[,}]', PAGE)}
    assert SelectionOptions(answer_regex=pattern).extract()(text) == "391"
