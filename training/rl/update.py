"""One learning step: updates the policy on a batch of completions and returns the metrics of the step.

The old log-probabilities of the ratio are computed here by the learner's model, not taken from the engine. So before
the first optimiser step the ratio is 1 and nothing is clipped, even if the batch was sampled one step earlier. The
engine's log-probabilities are used for the importance weights and for `mismatch`, the mean difference of the two.

A minibatch is computed in parts of `micro_batch_size`; its loss is the mean over all its tokens, whatever the parts.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from training.rl import losses
from training.rl.advantages import gae, leave_one_out, whiten
from training.rl.config import PPOTraining, RLMethod
from training.rl.kl import estimate_kl
from training.rl.learner import BatchMeasures, Learner
from training.rl.rewards import token_rewards
from training.rl.trajectories import Completion, drawn_logprobs


@dataclass(frozen=True, slots=True)
class _Targets:
    """What a batch is learnt from: advantages, the returns that the values should predict, and importance weights."""

    advantages_N_T: torch.Tensor
    returns_N_T: torch.Tensor
    weights_N_T: torch.Tensor


def optimiser_steps(settings: RLMethod) -> int:
    """The optimiser steps of the whole run."""
    per_step = settings.epochs * settings.minibatches if isinstance(settings, PPOTraining) else 1
    return settings.steps * per_step


def update(
    learner: Learner, completions: Sequence[Completion], beta: float, settings: RLMethod, rng: random.Random
) -> dict[str, float]:
    """Learns from the completions. Returns metrics of the policy before the update, and of the update itself."""
    before = learner.measure(completions)
    drawn_N_T = drawn_logprobs(completions, learner.device)
    targets = _targets(before, drawn_N_T, completions, beta, settings)
    sums = _UpdateSums()
    passes, parts = (settings.epochs, settings.minibatches) if isinstance(settings, PPOTraining) else (1, 1)
    learning_rate = learner.learning_rate
    for _ in range(passes):
        for rows in _shuffled(len(completions), parts, rng):
            _minibatch(learner, completions, rows, before, targets, settings, sums)
    mask = before.mask_N_T
    kl = estimate_kl(before.logprobs_N_T, before.ref_logprobs_N_T, mask)
    metrics = {
        "kl": kl.k1,
        "kl_k2": kl.k2,
        "kl_k3": kl.k3,
        "entropy": _mean(before.entropies_N_T, mask),
        "mismatch": _mean((before.logprobs_N_T - drawn_N_T).abs(), mask),
        "importance": _mean(targets.weights_N_T, mask),
        "learning_rate": learning_rate,
        **sums.means(),
    }
    if isinstance(settings, PPOTraining):
        metrics["explained_variance"] = losses.explained_variance(before.values_N_T, targets.returns_N_T, mask)
    return metrics


def _targets(
    before: BatchMeasures,
    drawn_N_T: torch.Tensor,
    completions: Sequence[Completion],
    beta: float,
    settings: RLMethod,
) -> _Targets:
    mask_N_T = before.mask_N_T
    scores_N = torch.tensor([completion.score for completion in completions], device=mask_N_T.device)
    rewards_N_T = token_rewards(scores_N, before.logprobs_N_T, before.ref_logprobs_N_T, mask_N_T, beta)
    weights_N_T = losses.importance_weights(before.logprobs_N_T, drawn_N_T, settings.largest_importance)
    if isinstance(settings, PPOTraining):
        advantages_N_T = gae(rewards_N_T, before.values_N_T, mask_N_T, settings.gae_lambda)
        returns_N_T = advantages_N_T + before.values_N_T * mask_N_T
        return _Targets(whiten(advantages_N_T, mask_N_T), returns_N_T, weights_N_T)
    returns_N = rewards_N_T.sum(-1)
    groups_N = [completion.group if settings.baseline == "rloo" else 0 for completion in completions]
    advantages_N_T = leave_one_out(returns_N, groups_N)[:, None] * mask_N_T
    return _Targets(advantages_N_T, returns_N[:, None] * mask_N_T, weights_N_T)


def _minibatch(
    learner: Learner,
    completions: Sequence[Completion],
    rows: Sequence[int],
    before: BatchMeasures,
    targets: _Targets,
    settings: RLMethod,
    sums: "_UpdateSums",
) -> None:
    num_tokens = float(before.mask_N_T[rows].sum())
    for begin in range(0, len(rows), settings.rows_at_once):
        part = list(rows[begin : begin + settings.rows_at_once])
        now = learner.forward([completions[row] for row in part])
        index = (part, slice(now.logprobs_N_T.shape[1]))  # of these tokens in the padded batch
        mask, old, advantages = (
            tensor_N_T[index] for tensor_N_T in (before.mask_N_T, before.logprobs_N_T, targets.advantages_N_T)
        )
        if isinstance(settings, PPOTraining):
            policy = losses.policy_loss(now.logprobs_N_T, old, advantages, settings.clip)
            old_values, returns = before.values_N_T[index], targets.returns_N_T[index]
            value = losses.value_loss(now.values_N_T, old_values, returns, settings.value_clip)
        else:
            policy = losses.reinforce_loss(now.logprobs_N_T, advantages)
            value = torch.zeros_like(policy)
        policy_loss = losses.token_mean(policy * targets.weights_N_T[index], mask, num_tokens)
        value_loss = losses.token_mean(value, mask, num_tokens)
        (policy_loss + value_loss).backward()  # type: ignore[no-untyped-call]
        clip = settings.clip if isinstance(settings, PPOTraining) else None
        sums.add_part((now.logprobs_N_T - old).detach().exp(), mask, clip, policy_loss.detach(), value_loss.detach())
    sums.add_step(learner.step())


class _UpdateSums:
    """Sums over all minibatches of an update, from which its mean metrics are made."""

    def __init__(self) -> None:
        self._tokens = self._ratios = self._clipped = 0.0
        self._policy_loss = self._value_loss = self._norms = 0.0
        self._steps = 0
        self._first_ratio_error = 0.0
        self._clips = False

    def add_part(
        self,
        ratio_N_T: torch.Tensor,
        mask_N_T: torch.Tensor,
        clip: float | None,
        policy_loss: torch.Tensor,
        value_loss: torch.Tensor,
    ) -> None:
        self._tokens += float(mask_N_T.sum())
        self._ratios += float((ratio_N_T * mask_N_T).sum())
        ratio_error_N_T = (ratio_N_T - 1).abs() * mask_N_T
        if clip is not None:
            self._clips = True
            self._clipped += float((ratio_error_N_T > clip).sum())
        if self._steps == 0:
            self._first_ratio_error = max(self._first_ratio_error, float(ratio_error_N_T.max()))
        self._policy_loss += float(policy_loss)
        self._value_loss += float(value_loss)

    def add_step(self, norm: float) -> None:
        self._steps += 1
        self._norms += norm

    def means(self) -> dict[str, float]:
        means = {
            "policy_loss": self._policy_loss / self._steps,
            "ratio": self._ratios / self._tokens,
            "first_ratio_error": self._first_ratio_error,
            "gradient_norm": self._norms / self._steps,
        }
        if self._clips:
            means["clip_fraction"] = self._clipped / self._tokens
            means["value_loss"] = self._value_loss / self._steps
        return means


def _shuffled(count: int, parts: int, rng: random.Random) -> Iterator[list[int]]:
    """The indexes from 0 to `count` in random order, in `parts` parts, or in `count` parts if that is fewer."""
    indexes = rng.sample(range(count), count)
    parts = min(parts, count)
    yield from (indexes[part::parts] for part in range(parts))


def _mean(values_N_T: torch.Tensor, mask_N_T: torch.Tensor) -> float:
    return float((values_N_T * mask_N_T).sum() / mask_N_T.sum())
