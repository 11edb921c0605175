"""The metrics of an evaluation, against numbers computed by hand."""

import math
from typing import Any

import pytest

from training.rl.evaluation.metrics import Change, Evaluation, EvaluationSample, change, repetition


def sample(index: int, **fields: Any) -> EvaluationSample:
    common: dict[str, Any] = {"prompt": "a", "completion": "b", "reward": 0.0, "judge": None, "kl": 0.0, "length": 5}
    common |= {"cut": False, "repetition": 0.0, "reference_nats": -2.5}
    return EvaluationSample(index, **common | fields)


def test_the_metrics_are_means_over_prompts() -> None:
    """Rewards 0, 0, 2, 2: squared deviations 4, variance 4 / 3, standard error sqrt(4 / 3 / 4). -10 nats, 20 tokens."""
    fields_by_prompt: list[dict[str, Any]] = [
        {"reward": 0.0, "judge": 0.5, "kl": 1.0, "length": 2, "cut": True, "repetition": 0.2},
        {"reward": 0.0, "judge": None, "kl": -1.0, "length": 4, "repetition": 0.0},
        {"reward": 2.0, "judge": None, "kl": 3.0, "length": 6, "repetition": 0.2},
        {"reward": 2.0, "judge": None, "kl": 1.0, "length": 8, "repetition": 0.0},
    ]
    evaluation = Evaluation(0, tuple(sample(index, **fields) for index, fields in enumerate(fields_by_prompt)))
    assert evaluation.metrics() == pytest.approx(
        {
            "completions": 4,
            "reward": 1.0,
            "reward_standard_error": 1 / math.sqrt(3),
            "judge": 0.5,
            "kl": 1.0,
            "kl_standard_error": math.sqrt(2 / 3),
            "length": 5.0,
            "cut": 0.25,
            "repetition": 0.1,
            "perplexity": math.exp(0.5),
        }
    )


def test_a_change_is_measured_prompt_by_prompt() -> None:
    """0 to 1 and 10 to 13 are changes of 1 and 3: 2 with a standard error of 1, however different the prompts are."""
    before = Evaluation(0, (sample(0, reward=0.0), sample(1, reward=10.0), sample(2, reward=50.0)))
    after = Evaluation(1, (sample(1, reward=13.0), sample(0, reward=1.0)))
    assert change(before, after, "reward") == Change(before=5.0, after=7.0, standard_error=1.0, prompts=2)
    assert change(before, after, "judge") is None


@pytest.mark.parametrize(
    ("token_ids", "share"),
    [([], 0.0), ([1, 1, 1], 0.0), ([1, 2, 3, 4, 5], 0.0), ([1, 1, 1, 1, 1, 1], 2 / 3), ([1, 2, 3, 4, 1, 2, 3, 4], 0.2)],
)
def test_repetition_is_the_share_of_4_grams_that_occurred_before(token_ids: list[int], share: float) -> None:
    """Six times token 1 is three equal 4-grams; 1 2 3 4 twice is five, of which the last repeats the first."""
    assert repetition(token_ids) == pytest.approx(share)


def test_samples_are_read_as_they_were_written() -> None:
    """A Unicode line separator in a completion does not end a line of the file."""
    written = Evaluation(3, (sample(0, completion="a\u2028b\n"), sample(1, prompt=[{"role": "user", "content": "é"}])))
    assert Evaluation.of_lines(3, written.lines()) == written


def test_sample_files_of_earlier_versions_are_read() -> None:
    """They name the index of the prompt `place`; a run that was started with them resumes."""
    written = Evaluation(3, (sample(7),))
    assert Evaluation.of_lines(3, written.lines().replace('"prompt_index"', '"place"')) == written
