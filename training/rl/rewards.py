"""The reward of each token of a completion.

    reward_t = -beta * (log pi_t - log pi_ref,t)  + score, the score only at the last token of the completion

The sum over a completion is score - beta * log-ratio, whose mean the optimum pi_ref * exp(score / beta) / Z maximises.
Padding has the reward 0.

A value of beta has a meaning only relative to the spread of the scores. So the scores can be scaled to mean 0 and
standard deviation 1 over samples of the reference policy (`ScoreScale`). The scale is measured once, before the first
step: a scale that followed the policy would hide its progress.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, pstdev
from typing import Self

import torch

SMALLEST_DEVIATION = 1e-6
"""Scores with a smaller deviation count as equal, and are only shifted."""


@dataclass(frozen=True, slots=True)
class ScoreScale:
    """score -> (score - mean) / deviation; by default the score is unchanged."""

    mean: float = 0.0
    deviation: float = 1.0

    @classmethod
    def measured(cls, scores: Sequence[float]) -> Self:
        """The scale on which these scores have mean 0 and standard deviation 1."""
        deviation = pstdev(scores)
        return cls(fmean(scores), deviation if deviation > SMALLEST_DEVIATION else 1.0)

    def __call__(self, score: float) -> float:
        return (score - self.mean) / self.deviation


def token_rewards(
    scores_N: torch.Tensor,
    logprobs_N_T: torch.Tensor,
    ref_logprobs_N_T: torch.Tensor,
    mask_N_T: torch.Tensor,
    beta: float,
) -> torch.Tensor:
    """rewards_N_T by the formula above. A row of `mask_N_T` is one or more ones, followed by zeros."""
    rewards_N_T = -beta * (logprobs_N_T - ref_logprobs_N_T) * mask_N_T
    last_N = mask_N_T.sum(-1).long() - 1
    rewards_N_T[torch.arange(len(scores_N)), last_N] += scores_N
    return rewards_N_T
