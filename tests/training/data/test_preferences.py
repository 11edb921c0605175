import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from reranker.candidate import Message, Prompt
from reranker.models.rendering import Renderer
from tests.support.tiny_models import tiny_tokenizer
from training.data.preferences import (
    RATED_GROUP,
    DataError,
    PreferenceRow,
    has_comparison,
    hold_out,
    ordered_pairs,
    read_rows,
    render_rows,
)
from training.reward.pair_accuracy import pair_accuracy

USER = {"role": "user", "content": "hi"}


def answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def read(path: Path, *lines: dict[str, Any]) -> list[PreferenceRow]:
    file = path / "data.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return read_rows(file)


def test_every_form_of_a_pair_is_read_as_the_same_row(tmp_path: Path) -> None:
    conversation = Prompt(messages=(Message("user", "hi"),))
    rows = read(
        tmp_path,
        {"prompt": [USER], "chosen": [answer("a")], "rejected": [answer("b")]},
        {"prompt": "hi", "chosen": [answer("a")], "rejected": [answer("b")]},
        {"prompt": [USER], "chosen": "a", "rejected": "b"},
        {"chosen": [USER, answer("a")], "rejected": [USER, answer("b")]},
    )
    assert {(row.prompt, row.texts) for row in rows} == {(conversation, ("a", "b"))}
    assert [row.group for row in rows] == [1, 2, 3, 4]
    assert read(tmp_path, {"prompt": "hi", "chosen": "a", "rejected": "b"})[0].prompt == Prompt(text="hi")
    assert read(tmp_path, {"chosen": "a", "rejected": "b"})[0].prompt == Prompt(text="")


def test_a_margin_is_read_and_other_columns_are_ignored(tmp_path: Path) -> None:
    rows = read(
        tmp_path,
        {"chosen": "a", "rejected": "b", "margin": 2},
        {"chosen": "a", "rejected": "b", "margin": None},
        {"chosen": "a", "rejected": "b", "prompt": None, "score_chosen": 8.5},
        {"text": "a", "rating": 3, "id": 7},
    )
    assert [row.margin for row in rows] == [2.0, 0.0, 0.0, 0.0]
    assert {row.prompt for row in rows} == {Prompt(text="")}
    assert rows[3].ratings == (3.0,)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ({"chosen": "a", "rejected": "a"}, "are the same"),
        ({"chosen": "a", "rejected": 3}, "rejected is not a string"),
        ({"chosen": [answer("a")], "rejected": [answer("b")]}, "there is no prompt"),
        ({"chosen": [USER, answer("a")], "rejected": [answer("b")]}, "answer different prompts"),
        ({"prompt": [USER], "chosen": [USER], "rejected": [answer("b")]}, "has to have the role assistant"),
        ({"prompt": [], "chosen": "a", "rejected": "b"}, "neither a string nor a list of messages"),
        ({"chosen": "a", "rejected": "b", "margin": "2"}, "margin is not a finite number"),
        ({"text": "a", "rating": "good"}, "rating is not a finite number"),
        ({"text": "a", "rating": True}, "rating is not a finite number"),
        ({"text": "a", "rating": 1, "prompt": "p"}, "the fields are prompt, rating, text"),
        ([1], "not a JSON object"),
    ],
)
def test_a_bad_line_is_refused_with_its_number_and_reason(line: Any, reason: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"data\.jsonl:2: .*{reason}"):
        read(tmp_path, {"chosen": "a", "rejected": "b"}, line)


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no rows"):
        read(tmp_path)


def test_a_text_too_long_for_the_model_is_refused_with_its_line(tmp_path: Path) -> None:
    rows = read(tmp_path, {"chosen": "a", "rejected": "b"}, {"chosen": "a", "rejected": "b " * 50})
    with pytest.raises(DataError, match=r"data\.jsonl:2: the candidate alone"):
        render_rows(rows, Renderer(tiny_tokenizer(), "document", 20), tmp_path / "data.jsonl")


def test_rated_texts_compare_from_the_smallest_gap_and_pairs_always() -> None:
    # Texts 0 to 2 are rated; 3 and 4 are a pair.
    ratings = torch.tensor([0.0, 1.0, 1.5, math.inf, 0.0])
    groups = torch.tensor([RATED_GROUP, RATED_GROUP, RATED_GROUP, 7, 7])
    better, worse = ordered_pairs(ratings, groups, min_gap=1.0)
    assert list(zip(better.tolist(), worse.tolist(), strict=True)) == [(1, 0), (2, 0), (3, 4)]


def test_equal_ratings_make_no_comparison_even_with_a_gap_of_zero() -> None:
    ratings, groups = torch.tensor([0.0, 0.0, 0.5]), torch.full((3,), RATED_GROUP)
    better, worse = ordered_pairs(ratings, groups, min_gap=0.0)
    assert list(zip(better.tolist(), worse.tolist(), strict=True)) == [(2, 0), (2, 1)]
    assert not has_comparison(rated(1.0, 1.0), 0.0)


def test_every_right_answer_is_compared_with_every_wrong_answer() -> None:
    ratings, groups = torch.tensor([math.inf, math.inf, 0.0, 0.0]), torch.zeros(4)
    better, worse = ordered_pairs(ratings, groups, min_gap=0.0)
    assert list(zip(better.tolist(), worse.tolist(), strict=True)) == [(0, 2), (0, 3), (1, 2), (1, 3)]


def test_answers_to_a_prompt_stay_in_one_part_of_the_split() -> None:
    rows = [
        PreferenceRow(i, Prompt(text=f"prompt {i % 50}"), (f"a{i}", f"b{i}"), (math.inf, 0.0), i) for i in range(200)
    ]
    train, held_out = hold_out(rows, 0.3)
    assert not {row.prompt for row in train} & {row.prompt for row in held_out}
    assert len(train) + len(held_out) == 200
    assert train
    assert held_out
    assert hold_out(rows, 0.0) == (rows, [])


def rated(*ratings: float) -> list[PreferenceRow]:
    return [PreferenceRow(i, Prompt(text=""), (str(i),), (rating,), RATED_GROUP) for i, rating in enumerate(ratings)]


def test_accuracy_counts_a_tie_as_half_and_nan_as_lost() -> None:
    rows = rated(0.0, 1.0, 2.0)  # comparisons 1>0, 2>0, 2>1
    assert pair_accuracy([(0.0,), (0.0,), (5.0,)], rows, min_gap=1).accuracy == pytest.approx(2.5 / 3)
    assert pair_accuracy([(0.0,), (1.0,), (math.nan,)], rows, min_gap=1).accuracy == pytest.approx(1 / 3)


def test_a_range_of_gaps_has_only_the_comparisons_within_it() -> None:
    measured = pair_accuracy([(0.0,), (1.0,), (2.0,)], rated(0.0, 1.0, 2.0), min_gap=1, max_gap=2)
    assert (measured.comparisons, measured.accuracy) == (2, 1.0)


def test_a_gap_in_decimals_counts_although_its_binary_form_is_smaller() -> None:
    assert 2.3 - 1.3 < 1
    rows = rated(1.3, 2.3)
    assert has_comparison(rows, 1.0)
    assert pair_accuracy([(0.0,), (1.0,)], rows, min_gap=1).comparisons == 1
    with pytest.raises(ValueError, match="nothing to compare"):
        pair_accuracy([(0.0,), (1.0,)], rows, min_gap=0, max_gap=1)


def test_the_interval_equals_that_of_resampling_rows_in_a_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    # Rated texts compare across rows, the pair within its row; a resample without any comparison does not count.
    rows = [*rated(0.0, 1.0, 3.5), PreferenceRow(3, Prompt(text=""), ("a", "b"), (math.inf, 0.0), 3)]
    rewards = [(0.5,), (0.0,), (0.5,), (0.0, 1.0)]
    generator = torch.Generator().manual_seed(3)
    accuracies = []
    for _ in range(1000):
        indexes = torch.randint(4, (4,), generator=generator).tolist()
        won = [
            1.0 if rewards[better][0] > rewards[worse][0] else 0.5 * (rewards[better][0] == rewards[worse][0])
            for better in indexes
            for worse in indexes
            if max(better, worse) < 3 and rows[better].ratings[0] - rows[worse].ratings[0] >= 1
        ]
        won += [0.0] * indexes.count(3)  # the pair is lost
        if won:
            accuracies.append(sum(won) / len(won))
    expected = torch.tensor(accuracies, dtype=torch.float64).quantile(torch.tensor([0.025, 0.975]).double()).tolist()
    assert len(accuracies) < 1000  # 3 of 4^4 resamples are the same rated text four times
    for at_once in (1, 2, 512):
        monkeypatch.setattr("training.reward.pair_accuracy.ROWS_AT_ONCE", at_once)
        monkeypatch.setattr("training.reward.pair_accuracy.TIMES_AT_ONCE", 100 * at_once)
        measured = pair_accuracy(rewards, rows, min_gap=1, seed=3)
        assert [measured.low, measured.high] == pytest.approx(expected)


def test_the_interval_of_independent_pairs_is_the_binomial_one() -> None:
    # 20 independent pairs, of which 15 are won.
    pairs = [PreferenceRow(i, Prompt(text=""), ("a", "b"), (math.inf, 0.0), i) for i in range(20)]
    measured = pair_accuracy([(1.0 if i < 15 else -1.0, 0.0) for i in range(20)], pairs, min_gap=1)
    assert measured.accuracy == 0.75
    # The binomial standard error is sqrt(.75 * .25 / 20) = .097: about .19 to either side.
    assert measured.low == pytest.approx(0.55, abs=0.06)
    assert measured.high == pytest.approx(0.95, abs=0.06)


def test_rows_without_a_comparison_are_an_error() -> None:
    with pytest.raises(ValueError, match="nothing to compare"):
        pair_accuracy([(0.0,), (1.0,)], rated(0.0, 0.5), min_gap=1)
