import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from reranker.candidate import Message, Prompt
from tests.support.tiny_models import save_tiny_reward_model
from training.cli import evaluate_app
from training.data.preferences import RATED_GROUP, DataError, PreferenceRow, read_rows
from training.reward.best_of_n_accuracy import best_of_n_accuracy
from training.reward.calibration import calibration_error, log_loss, reliability_curve
from training.reward.evaluate import accuracies


def best_of_4(number: int, subset: str = "", chosen: int = 1) -> PreferenceRow:
    texts = tuple(f"{number}-{i}" for i in range(4))
    return PreferenceRow(
        number, Prompt(text="p"), texts, (math.inf,) * chosen + (0.0,) * (4 - chosen), number, subset=subset
    )


def test_log_loss_is_that_of_the_predicted_probabilities() -> None:
    # Leads 0 and ln 3 predict the outcome with 1/2 and 3/4.
    assert log_loss(torch.tensor([0.0, math.log(3)])) == pytest.approx((math.log(2) + math.log(4 / 3)) / 2)


def test_the_reliability_curve_compares_predicted_probability_with_the_share_of_wins() -> None:
    # The favourite of four comparisons has 3/4: it wins three and loses one. One tie: predicted 1/2, half won.
    lead = math.log(3)
    tie, sure = reliability_curve(torch.tensor([lead, lead, lead, -lead, 0.0], dtype=torch.float64))
    assert (tie.predicted, tie.won, tie.comparisons) == (0.5, 0.5, 1)
    assert sure.predicted == pytest.approx(0.75)
    assert (sure.won, sure.comparisons) == (0.75, 4)
    assert calibration_error([tie, sure]) == pytest.approx(0, abs=1e-9)


def test_an_overconfident_model_has_a_large_calibration_error() -> None:
    # sigma(ln 99) = .99, but the favourite wins half of the comparisons.
    lead = math.log(99)
    assert calibration_error(reliability_curve(torch.tensor([lead, -lead]))) == pytest.approx(0.49, abs=1e-6)


@pytest.mark.parametrize(
    ("scores", "credit"),
    [
        ((3.0, 1.0, 2.0, 0.0), 1.0),
        ((2.0, 2.0, 2.0, 0.0), 1 / 3),
        ((1.0, 0.0, 2.0, 0.0), 0.0),
        ((math.nan, 0.0, 0.0, 0.0), 0.0),
    ],
)
def test_the_right_answer_has_to_beat_all_wrong_answers_and_shares_the_credit_in_a_tie(
    scores: tuple[float, ...], credit: float
) -> None:
    measured = best_of_n_accuracy([scores], [best_of_4(1)])["all"]
    assert measured.accuracy == pytest.approx(credit)
    assert measured.chance == 0.25


def test_all_right_answers_have_to_beat_all_wrong_answers() -> None:
    row = best_of_4(1, chosen=2)
    assert best_of_n_accuracy([(3.0, 2.0, 1.0, 0.0)], [row])["all"].accuracy == 1
    assert best_of_n_accuracy([(3.0, 0.5, 1.0, 0.0)], [row])["all"].accuracy == 0


def test_subsets_are_measured_separately_and_pairs_are_left_out() -> None:
    pair = PreferenceRow(3, Prompt(text="p"), ("a", "b"), (math.inf, 0.0), 3)
    won, lost = (3.0, 1.0, 2.0, 0.0), (0.0, 1.0, 2.0, 0.0)
    measured = best_of_n_accuracy([won, lost, (1.0, 0.0)], [best_of_4(1, "Math"), best_of_4(2, "Focus"), pair])
    assert {name: (accuracy.accuracy, accuracy.rows) for name, accuracy in measured.items()} == {
        "all": (0.5, 2),
        "Math": (1.0, 1),
        "Focus": (0.0, 1),
    }


def test_the_accuracy_of_length_alone_is_measured_too() -> None:
    # The longer text is the better one in one of two pairs; the model orders both correctly.
    rows = [
        PreferenceRow(i, Prompt(text=""), texts, (math.inf, 0.0), i)
        for i, texts in enumerate([("long", "s"), ("s", "long")])
    ]
    measured = accuracies([(1.0, 0.0), (1.0, 0.0)], rows, min_gap=1)
    assert (measured.overall.accuracy, measured.length_alone.accuracy) == (1.0, 0.5)


def test_texts_closer_than_the_smallest_gap_count_only_in_their_own_range() -> None:
    # 0 against 0.5 is close and lost; the other comparisons are 2 or more apart and won.
    rows = [
        PreferenceRow(i, Prompt(text=""), ("t",), (rating,), RATED_GROUP) for i, rating in enumerate((0.0, 0.5, 2.5))
    ]
    measured = accuracies([(1.0,), (0.0,), (2.0,)], rows, min_gap=1)
    assert (measured.overall.accuracy, measured.overall.comparisons) == (1.0, 2)
    assert {name: (accuracy.accuracy, accuracy.comparisons) for name, accuracy in measured.by_gap.items()} == {
        "0 to 1": (0.0, 1),
        "2 to 3": (1.0, 2),
    }


def test_rewardbench_rows_are_read_and_all_measurements_written(tmp_path: Path) -> None:
    model = save_tiny_reward_model(tmp_path / "model")
    data = tmp_path / "bench.jsonl"
    line = {
        "id": "1",
        "prompt": "hi",
        "chosen": ["great"],
        "rejected": ["dull", "far too long", "no"],
        "subset": "Math",
    }
    data.write_text("".join(json.dumps(line | {"prompt": f"hi {i}"}) + "\n" for i in range(3)))
    row = read_rows(data)[0]
    assert row.prompt == Prompt(messages=(Message("user", "hi 0"),))
    assert row.texts == ("great", "dull", "far too long", "no")

    options = ["--reward-model", str(model), "--device", "cpu", "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(evaluate_app, ["reward", "--data", str(data), *options])
    assert result.exit_code == 0, result.output
    assert "Best of n, Math" in result.output
    written = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert written["overall"]["comparisons"] == 9
    assert written["best_of_n"]["Math"]["rows"] == 3
    assert (tmp_path / "out" / "evaluation.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ({"prompt": "hi", "chosen": ["a"], "rejected": ["a", "b"]}, "chosen and rejected both hold 'a'"),
        ({"prompt": "hi", "chosen": ["a"], "rejected": "b"}, "so rejected has to be one too"),
        ({"chosen": ["a"], "rejected": ["b"]}, "prompt is neither a string nor a list of messages"),
    ],
)
def test_answers_that_cannot_be_compared_are_refused(line: dict[str, Any], reason: str, tmp_path: Path) -> None:
    data = tmp_path / "bench.jsonl"
    data.write_text(json.dumps(line))
    with pytest.raises(DataError, match=rf"bench\.jsonl:1: .*{reason}"):
        read_rows(data)
