"""The loss of reward training: by hand, against TRL's trainer on the same tokens, and as an estimator."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl import RewardConfig, RewardTrainer

from reranker.models.rendering import Rendered
from reranker.models.reward_model import forward_rewards
from tests.support.tiny_models import save_tiny_reward_model
from training.data.preferences import Example
from training.reward.train import bradley_terry_loss, collate

FIRST, SECOND, NONE = torch.tensor([0]), torch.tensor([1]), torch.tensor([], dtype=torch.long)
"""Indexes of the better or worse text of each comparison."""


def test_the_loss_is_bradley_and_terrys() -> None:
    # sigma(0) = 1/2, sigma(ln 3) = 3/4: the mean of ln 2 and ln 4/3.
    rewards = torch.tensor([0.0, 0.0, math.log(3)])
    loss = bradley_terry_loss(rewards, torch.tensor([0, 2]), torch.tensor([1, 0]))
    assert loss.item() == pytest.approx((math.log(2) + math.log(4 / 3)) / 2)


def test_a_margin_is_subtracted_from_the_lead() -> None:
    # The lead is ln 3 and so is the margin: the better text wins by the margin with probability 1/2.
    rewards = torch.tensor([math.log(3), 0.0])
    loss = bradley_terry_loss(rewards, FIRST, SECOND, margins_K=torch.tensor([math.log(3)]))
    assert loss.item() == pytest.approx(math.log(2))


def test_centring_penalises_rewards_far_from_zero() -> None:
    losses = (bradley_terry_loss(torch.tensor([r + 1, r]), FIRST, SECOND, center=0.5).item() for r in (-0.5, 2.0))
    around_zero, far_from_zero = losses
    assert far_from_zero - around_zero == pytest.approx(0.5 * (3.0 + 2.0) ** 2)


def test_a_batch_without_a_comparison_has_no_gradient() -> None:
    rewards = torch.tensor([1.0, 2.0], requires_grad=True)
    loss = bradley_terry_loss(rewards, NONE, NONE, center=1.0)
    torch.autograd.backward([loss])
    assert loss.item() == 0
    assert rewards.grad is not None
    assert rewards.grad.tolist() == [0, 0]


@pytest.mark.parametrize("center", [0.0, 0.01])
def test_the_loss_and_its_gradient_equal_trls(center: float, tmp_path: Path) -> None:
    directory = save_tiny_reward_model(tmp_path / "model")
    model = AutoModelForSequenceClassification.from_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    texts = [("great film", "dull, far too long"), ("The capital is Paris", "no"), ("a delight", "no sense at all")]
    rows = [
        {
            "chosen_ids": tokenizer(chosen)["input_ids"],
            "rejected_ids": tokenizer(rejected)["input_ids"],
            "margin": margin,
        }
        for (chosen, rejected), margin in zip(texts, (0.5, 0.0, 2.0), strict=True)
    ]
    config = RewardConfig(
        output_dir=str(tmp_path), center_rewards_coefficient=center or None, report_to="none", use_cpu=True, bf16=False,
        gradient_checkpointing=False,
    )  # fmt: skip
    trainer = RewardTrainer(model, config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    theirs = trainer.compute_loss(model, trainer.data_collator(rows))

    examples = []
    for group, row in enumerate(rows):
        chosen, rejected = (Rendered(tuple(row[name]), prompt_length=0) for name in ("chosen_ids", "rejected_ids"))
        examples.append(Example((chosen, rejected), (math.inf, 0.0), group, row["margin"]))
    batch = collate(examples, tokenizer.pad_token_id, min_gap=1.0)
    rewards_N = forward_rewards(model, batch["input_ids"], batch["attention_mask"])
    ours = bradley_terry_loss(rewards_N, batch["better"], batch["worse"], margins_K=batch["margins"], center=center)

    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    gradients = [torch.autograd.grad(loss, list(model.parameters())) for loss in (ours, theirs)]
    for our_gradient, their_gradient in zip(*gradients, strict=True):
        torch.testing.assert_close(our_gradient, their_gradient, rtol=1e-4, atol=1e-6)


def test_the_loss_recovers_the_scores_from_which_noisy_choices_were_drawn() -> None:
    # 40,000 choices among 8 items: each item is in 10,000 of them, so the standard error of a score is about
    # 1 / sqrt(10,000 * p(1 - p)), or .022 for scores this close. The seed is fixed.
    scores_N = torch.tensor([-1.5, -1.0, -0.4, -0.1, 0.2, 0.5, 0.9, 1.4])
    rng = np.random.default_rng(0)  # the same on every CPU
    first_K = torch.from_numpy(rng.integers(8, size=40_000))
    second_K = (first_K + torch.from_numpy(rng.integers(1, 8, size=40_000))) % 8
    wins_K = torch.from_numpy(rng.random(40_000)) < torch.sigmoid(scores_N[first_K] - scores_N[second_K])
    better_K, worse_K = torch.where(wins_K, first_K, second_K), torch.where(wins_K, second_K, first_K)

    fitted_N = torch.zeros(8, requires_grad=True)
    optimizer = torch.optim.LBFGS([fitted_N], line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = bradley_terry_loss(fitted_N, better_K, worse_K)
        torch.autograd.backward([value])
        return value

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    centred_N = fitted_N.detach() - fitted_N.detach().mean()
    assert (centred_N - (scores_N - scores_N.mean())).abs().max() < 0.06
