"""The arithmetic of PPO and REINFORCE, against numbers worked out by hand."""

import math

import pytest
import torch

from training.rl.advantages import gae, leave_one_out, whiten
from training.rl.kl import KLController, estimate_kl
from training.rl.losses import (
    entropies,
    explained_variance,
    importance_weights,
    policy_loss,
    reinforce_loss,
    token_logprobs,
    token_mean,
    value_loss,
)
from training.rl.rewards import ScoreScale, token_rewards

PADDED = torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]])


def near(*numbers: object) -> object:
    return pytest.approx(numbers[0] if len(numbers) == 1 else list(numbers), abs=1e-6)


def test_the_score_is_added_at_the_last_token_and_beta_times_the_log_ratio_is_subtracted_from_each() -> None:
    """beta .5; log-ratios (1, -1, 2) and (0, 3): (-.5, .5, -1 + 10) and (0, -1.5 + 20); 0 on padding."""
    logprobs = torch.tensor([[-1.0, -2.0, -1.0], [-1.0, -1.0, -9.0]])
    ref_logprobs = torch.tensor([[-2.0, -1.0, -3.0], [-1.0, -4.0, 99.0]])
    rewards = token_rewards(torch.tensor([10.0, 20.0]), logprobs, ref_logprobs, PADDED, beta=0.5)
    assert rewards.tolist() == [near(-0.5, 0.5, 9.0), near(0.0, 18.5, 0.0)]


def test_log_probability_and_entropy_are_those_of_the_softmax_of_the_logits() -> None:
    """Logits log 1 and log 3: a quarter and three quarters. Two equal logits: an entropy of log 2 nats."""
    logits = torch.tensor([[[0.0, math.log(3)], [5.0, 5.0]]])
    logprobs = token_logprobs(logits, torch.tensor([[1, 0]]))
    assert logprobs.tolist() == [near(math.log(3 / 4), math.log(1 / 2))]
    entropy = math.log(4) / 4 + 3 * math.log(4 / 3) / 4
    assert entropies(logits).tolist() == [near(entropy, math.log(2))]


def test_the_estimators_of_kl_are_means_over_completions_of_sums_over_tokens() -> None:
    """d = log 2 and -log 2, then log 2 alone: k1 = (0 + log 2) / 2; k2 = (2 + 1) * log^2(2) / 2 / 2.

    k3 of d = log 2 is 1/2 - 1 + log 2, of d = -log 2 it is 2 - 1 - log 2: their sum is 1/2.
    """
    log2 = math.log(2)
    d = torch.tensor([[log2, -log2, 0.0], [log2, 0.0, 7.0]])
    kl = estimate_kl(d - 1, torch.full_like(d, -1.0), PADDED)
    assert kl.k1 == near(log2 / 2)
    assert kl.k2 == near(3 * log2**2 / 4)
    assert kl.k3 == near((0.5 + log2 - 0.5) / 2)


def test_beta_adapts_to_the_target_and_is_constant_without_one() -> None:
    """KL 6.6 for a target of 6: error .1, with 256 of 1024: beta .2 * 1.025. Twice the target, clipped: * 1.05."""
    controller = KLController(0.2, target=6.0, horizon=1024)
    controller.observe(6.6, 256)
    assert controller.beta == near(0.205)
    controller.observe(12.0, 256)
    assert controller.beta == near(0.21525)
    controller.observe(0.0, 256)
    assert controller.beta == near(0.2044875)
    fixed = KLController(0.2)
    fixed.observe(100.0, 256)
    assert fixed.beta == 0.2


def test_gae_starts_from_a_value_of_zero_after_the_last_token() -> None:
    """Rewards (0, 0, 1), values (.5, .6, .7), lambda .95: deltas .1, .1, .3; A = (.46575, .385, .3).

    Rewards (0, 1), values (.2, .4): deltas .2, .6; A = (.2 + .95 * .6, .6), whatever the values on padding.
    """
    rewards = torch.tensor([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
    values = torch.tensor([[0.5, 0.6, 0.7], [0.2, 0.4, 99.0]])
    assert gae(rewards, values, PADDED, 0.95).tolist() == [near(0.46575, 0.385, 0.3), near(0.77, 0.6, 0.0)]


def test_with_lambda_1_an_advantage_is_the_return_minus_the_value() -> None:
    rewards, values = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[0.5, 1.0, 1.5]])
    assert gae(rewards, values, torch.ones(1, 3), 1.0).tolist() == [near(6.5, 5.0, 2.5)]


def test_whitening_ignores_padding() -> None:
    """1, 2, 3, 4, 5: mean 3, variance 2; the 99 on padding does not count."""
    whitened = whiten(torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 99.0]]), PADDED)
    root2 = math.sqrt(2)
    assert whitened.tolist() == [near(-root2, -1 / root2, 0.0), near(1 / root2, root2, 0.0)]
    assert whiten(torch.full((2, 3), 7.0), PADDED).tolist() == [[0.0] * 3] * 2


def test_rloo_compares_a_return_with_the_others_of_its_prompt() -> None:
    """1, 3, 8 of one prompt: 1 - 5.5, 3 - 4.5, 8 - 2. 4 and 6 of another: -2, 2. A single return: 0."""
    returns = torch.tensor([1.0, 4.0, 3.0, 6.0, 8.0, 5.0])
    assert leave_one_out(returns, [0, 1, 0, 1, 0, 2]).tolist() == near(-4.5, -2.0, -1.5, 2.0, 6.0, 0.0)


def test_the_batch_baseline_compares_a_return_with_all_others() -> None:
    """0, 3, 6: 0 - 4.5, 3 - 3, 6 - 1.5."""
    assert leave_one_out(torch.tensor([0.0, 3.0, 6.0]), [0, 0, 0]).tolist() == near(-4.5, 0.0, 4.5)


def test_the_ratio_is_clipped_only_where_clipping_raises_the_loss() -> None:
    """Clip .2. Ratio 1.5: A 1 gives -1.2, A -1 gives 1.5. Ratio .5: A 1 gives -.5, A -1 gives .8. Ratio 1: -A."""
    ratio = torch.tensor([[1.5, 1.5, 0.5, 0.5, 1.0]])
    advantages = torch.tensor([[1.0, -1.0, 1.0, -1.0, 3.0]])
    losses = policy_loss(ratio.log(), torch.zeros(1, 5), advantages, 0.2)
    assert losses.tolist() == [near(-1.2, 1.5, -0.5, 0.8, -3.0)]


def test_a_clipped_ratio_has_no_gradient() -> None:
    logprobs = torch.tensor([[1.5, 1.5]]).log().requires_grad_()
    policy_loss(logprobs, torch.zeros(1, 2), torch.tensor([[1.0, -1.0]]), 0.2).sum().backward()  # type: ignore[no-untyped-call]
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == [near(0.0, 1.5)]


def test_the_value_loss_is_the_larger_of_the_clipped_and_unclipped_one() -> None:
    """Old 0, clip .2. Value 1: clipped to .2, return 1: .8^2 / 2; return 0: 1 / 2. Value .1, return .3: .2^2 / 2."""
    losses = value_loss(torch.tensor([[1.0, 1.0, 0.1]]), torch.zeros(1, 3), torch.tensor([[1.0, 0.0, 0.3]]), 0.2)
    assert losses.tolist() == [near(0.32, 0.5, 0.02)]


def test_the_gradient_of_reinforce_is_the_advantage() -> None:
    logprobs = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    reinforce_loss(logprobs, torch.tensor([[2.0, -3.0]])).sum().backward()  # type: ignore[no-untyped-call]
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == [[-2.0, 3.0]]


def test_importance_weights_are_truncated_above() -> None:
    weights = importance_weights(torch.tensor([0.5, 0.9, 0.1]).log(), torch.tensor([0.25, 0.1, 0.2]).log(), 3.0)
    assert weights.tolist() == near(2.0, 3.0, 0.5)


@pytest.mark.parametrize("method", ["ppo", "reinforce"])
def test_importance_weights_give_an_earlier_policys_batch_the_gradient_of_the_learners_own(method: str) -> None:
    """a, b, b, b were sampled, as a had probability 1/4; the learner gives it 1/2: weights 2, 2/3. Advantages: 3 and 1.

    The gradient of the logit of a is -mean(w A ([a] - 1/2)) = -(2 * 3/2 - 3 * 2/3 * 1/2) / 4 = -1/2, equal to that of a
    batch of a and b: -(3/2 - 1/2) / 2. Unweighted it is -(3/2 - 3 * 1/2) / 4 = 0. With weights up to 1: -(3/2 - 1) / 4.
    """
    answers = torch.tensor([[0, 1, 1, 1]])
    drawn = torch.tensor([[0.25, 0.75, 0.75, 0.75]]).log()
    advantages = torch.tensor([[3.0, 1.0, 1.0, 1.0]])

    def gradient(largest: float) -> list[float]:
        logits = torch.zeros(2, requires_grad=True)
        logprobs = logits.log_softmax(-1)[answers]
        old = logprobs.detach()
        losses = (
            policy_loss(logprobs, old, advantages, 0.2) if method == "ppo" else reinforce_loss(logprobs, advantages)
        )
        weighted = losses * importance_weights(old, drawn, largest)
        token_mean(weighted, torch.ones_like(drawn), 4).backward()  # type: ignore[no-untyped-call]
        assert logits.grad is not None
        return list(logits.grad.tolist())

    assert gradient(largest=3.0) == near(-0.5, 0.5)
    assert gradient(largest=1.0) == near(-0.125, 0.125)


def test_the_losses_of_parts_add_up_to_the_loss_of_the_batch() -> None:
    """Sums 6 and 9 over five tokens: 3, for both rows together or for each on its own."""
    losses = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 99.0]])
    batch_loss = token_mean(losses, PADDED, 5)
    row_losses = [token_mean(losses[row : row + 1], PADDED[row : row + 1], 5) for row in (0, 1)]
    assert float(batch_loss) == near(3.0)
    assert [float(loss) for loss in row_losses] == near(1.2, 1.8)


def test_explained_variance_is_1_for_perfect_values_and_0_for_a_constant() -> None:
    """Returns 1, 2, 3, 4, 5 have variance 2; values with errors (1, -1, 1, -1, 0) leave .8 of it: 1 - .4."""
    returns = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, -50.0]])
    errors = torch.tensor([[1.0, -1.0, 1.0], [-1.0, 0.0, 99.0]])
    assert explained_variance(returns, returns, PADDED) == near(1.0)
    assert explained_variance(torch.full((2, 3), 7.0), returns, PADDED) == near(0.0)
    assert explained_variance(returns + errors, returns, PADDED) == near(0.6)


def test_scores_are_scaled_to_mean_0_and_deviation_1() -> None:
    """1, 3, 5, 7: mean 4, deviation sqrt(5)."""
    scale = ScoreScale.measured([1.0, 3.0, 5.0, 7.0])
    assert (scale.mean, scale.deviation) == (4.0, near(math.sqrt(5)))
    assert scale(4 + 2 * math.sqrt(5)) == near(2.0)
    assert ScoreScale.measured([3.0, 3.0])(5.0) == 2.0
    assert ScoreScale()(5.0) == 5.0
