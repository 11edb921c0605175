from pathlib import Path

import pytest

from benchmarks.linear_head import train_linear_head
from reranker.candidate import Prompt
from tests.support.tiny_models import save_tiny_policy
from training.data.preferences import RATED_GROUP, PreferenceRow
from training.reward.config import RewardTraining
from training.reward.pair_accuracy import pair_accuracy


def film(number: int) -> PreferenceRow:
    """A text whose rating depends on a single word; the other words vary in number and kind."""
    filler = " ".join(["film", "cast", "capital"][: 1 + number % 3])
    word, rating = (("great", 2.0), ("dull", -2.0))[number % 2]
    return PreferenceRow(number, Prompt(text=""), (f"{filler} {word} {number}",), (rating,), RATED_GROUP)


def test_a_linear_head_on_the_frozen_trunk_orders_unseen_texts(tmp_path: Path) -> None:
    settings = RewardTraining(base_model=str(save_tiny_policy(tmp_path / "base")), style="document")
    score = train_linear_head([film(i) for i in range(60)], tmp_path, settings, steps=200)
    unseen = [film(i) for i in range(60, 90)]
    rewards = score(unseen, tmp_path)
    assert pair_accuracy(rewards, unseen, min_gap=1).accuracy > 0.95
    reversed_rewards = [reward for (reward,) in score(unseen[::-1], tmp_path)[::-1]]
    assert reversed_rewards == pytest.approx([reward for (reward,) in rewards], abs=1e-4)
