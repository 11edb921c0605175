"""One step of learning: a batch of completions in, a better policy and the measures of the step out.

The log-probabilities that the ratio starts from are computed here, by the model that learns, and not taken from the
engine; so before the first step of the optimiser the ratio is 1 and nothing is clipped, also where the batch was drawn
one step ago. What the engine drew with is kept beside them for the importance weights and for `mismatch`, the mean
difference of the two.

A minibatch is computed in parts of `micro_batch_size`, and its loss is a mean over all its tokens, however it is cut.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from training.rl import losses
from training.rl.advantages import gae, leave_one_out, whiten
from training.rl.config import PPOTraining, ReinforceTraining
from training.rl.kl import estimate_kl
from training.rl.learner import Learner, Measured
from training.rl.rewards import token_rewards
from training.rl.trajectories import Completion, drawn_logprobs

Method = PPOTraining | ReinforceTraining


@dataclass(frozen=True, slots=True)
class _Targets:
    """What a batch is to be learnt from; `returns` are what the values should have been."""

    advantages_N_T: torch.Tensor
    returns_N_T: torch.Tensor
    weights_N_T: torch.Tensor


def optimiser_steps(settings: Method) -> int:
    """How many the whole run takes."""
    each = settings.epochs * settings.minibatches if isinstance(settings, PPOTraining) else 1
    return settings.steps * each


def update(
    learner: Learner, completions: Sequence[Completion], beta: float, settings: Method, rng: random.Random
) -> dict[str, float]:
    """Learns from the completions; the measures are of the policy as it was before, unless they are of the learning."""
    measured = learner.measure(completions)
    drawn_N_T = drawn_logprobs(completions, learner.device)
    targets = _targets(measured, drawn_N_T, completions, beta, settings)
    learnt = _Learnt()
    passes, parts = (settings.epochs, settings.minibatches) if isinstance(settings, PPOTraining) else (1, 1)
    learning_rate = learner.learning_rate
    for _ in range(passes):
        for rows in _shuffled(len(completions), parts, rng):
            _minibatch(learner, completions, rows, measured, targets, settings, learnt)
    mask = measured.mask_N_T
    kl = estimate_kl(measured.logprobs_N_T, measured.ref_logprobs_N_T, mask)
    found = {
        "kl": kl.k1,
        "kl_k2": kl.k2,
        "kl_k3": kl.k3,
        "entropy": _mean(measured.entropies_N_T, mask),
        "mismatch": _mean((measured.logprobs_N_T - drawn_N_T).abs(), mask),
        "importance": _mean(targets.weights_N_T, mask),
        "learning_rate": learning_rate,
        **learnt.means(),
    }
    if isinstance(settings, PPOTraining):
        found["explained_variance"] = losses.explained_variance(measured.values_N_T, targets.returns_N_T, mask)
    return found


def _targets(
    measured: Measured, drawn_N_T: torch.Tensor, completions: Sequence[Completion], beta: float, settings: Method
) -> _Targets:
    mask_N_T = measured.mask_N_T
    scores_N = torch.tensor([one.score for one in completions], device=mask_N_T.device)
    rewards_N_T = token_rewards(scores_N, measured.logprobs_N_T, measured.ref_logprobs_N_T, mask_N_T, beta)
    weights_N_T = losses.importance_weights(measured.logprobs_N_T, drawn_N_T, settings.largest_importance)
    if isinstance(settings, PPOTraining):
        advantages_N_T = gae(rewards_N_T, measured.values_N_T, mask_N_T, settings.gae_lambda)
        returns_N_T = advantages_N_T + measured.values_N_T * mask_N_T
        return _Targets(whiten(advantages_N_T, mask_N_T), returns_N_T, weights_N_T)
    returns_N = rewards_N_T.sum(-1)
    groups_N = [one.group if settings.baseline == "rloo" else 0 for one in completions]
    advantages_N_T = leave_one_out(returns_N, groups_N)[:, None] * mask_N_T
    return _Targets(advantages_N_T, returns_N[:, None] * mask_N_T, weights_N_T)


def _minibatch(
    learner: Learner,
    completions: Sequence[Completion],
    rows: Sequence[int],
    measured: Measured,
    targets: _Targets,
    settings: Method,
    learnt: "_Learnt",
) -> None:
    num_tokens = float(measured.mask_N_T[rows].sum())
    for begin in range(0, len(rows), settings.rows_at_once):
        part = list(rows[begin : begin + settings.rows_at_once])
        now = learner.read([completions[row] for row in part])
        place = (part, slice(now.logprobs_N_T.shape[1]))  # in the padded rows of the whole batch
        mask, old, advantages = (
            of_batch[place] for of_batch in (measured.mask_N_T, measured.logprobs_N_T, targets.advantages_N_T)
        )
        if isinstance(settings, PPOTraining):
            policy = losses.policy_loss(now.logprobs_N_T, old, advantages, settings.clip)
            old_values, returns = measured.values_N_T[place], targets.returns_N_T[place]
            value = losses.value_loss(now.values_N_T, old_values, returns, settings.value_clip)
        else:
            policy = losses.reinforce_loss(now.logprobs_N_T, advantages)
            value = torch.zeros_like(policy)
        policy_loss = losses.token_mean(policy * targets.weights_N_T[place], mask, num_tokens)
        value_loss = losses.token_mean(value, mask, num_tokens)
        (policy_loss + value_loss).backward()  # type: ignore[no-untyped-call]
        clip = settings.clip if isinstance(settings, PPOTraining) else None
        learnt.saw((now.logprobs_N_T - old).detach().exp(), mask, clip, policy_loss.detach(), value_loss.detach())
    learnt.stepped(learner.step())


class _Learnt:
    """Sums over the minibatches of a step."""

    def __init__(self) -> None:
        self._tokens = self._ratios = self._clipped = 0.0
        self._policy_loss = self._value_loss = self._norms = 0.0
        self._steps = 0
        self._first_ratio_error = 0.0
        self._clips = False

    def saw(
        self,
        ratio_N_T: torch.Tensor,
        mask_N_T: torch.Tensor,
        clip: float | None,
        policy_loss: torch.Tensor,
        value_loss: torch.Tensor,
    ) -> None:
        self._tokens += float(mask_N_T.sum())
        self._ratios += float((ratio_N_T * mask_N_T).sum())
        off_N_T = (ratio_N_T - 1).abs() * mask_N_T
        if clip is not None:
            self._clips = True
            self._clipped += float((off_N_T > clip).sum())
        if self._steps == 0:
            self._first_ratio_error = max(self._first_ratio_error, float(off_N_T.max()))
        self._policy_loss += float(policy_loss)
        self._value_loss += float(value_loss)

    def stepped(self, norm: float) -> None:
        self._steps += 1
        self._norms += norm

    def means(self) -> dict[str, float]:
        found = {
            "policy_loss": self._policy_loss / self._steps,
            "ratio": self._ratios / self._tokens,
            "first_ratio_error": self._first_ratio_error,
            "gradient_norm": self._norms / self._steps,
        }
        if self._clips:
            found["clip_fraction"] = self._clipped / self._tokens
            found["value_loss"] = self._value_loss / self._steps
        return found


def _shuffled(count: int, parts: int, rng: random.Random) -> Iterator[list[int]]:
    """All places in a random order, in so many parts, or fewer where there are fewer places."""
    places = rng.sample(range(count), count)
    parts = min(parts, count)
    yield from (places[part::parts] for part in range(parts))


def _mean(values_N_T: torch.Tensor, mask_N_T: torch.Tensor) -> float:
    return float((values_N_T * mask_N_T).sum() / mask_N_T.sum())
