"""What a completion earns, token by token.

    reward_t = -beta * (log pi_t - log pi_ref,t)  + score, at the last token of the completion alone

The sum over a completion is score - beta * log-ratio, whose mean the optimum pi_ref * exp(score / beta) / Z maximises.
Padding earns nothing.

beta has a meaning only beside the spread of the scores. So they can be set to mean 0 and deviation 1 over samples of
the reference policy (`ScoreScale`), which is measured once, before the first step: a scale that followed the policy
would hide that it gets better.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, pstdev
from typing import Self

import torch

SMALLEST_DEVIATION = 1e-6
"""Scores that differ by less are all the same; they are then only shifted."""


@dataclass(frozen=True, slots=True)
class ScoreScale:
    """score -> (score - mean) / deviation; as it is made, it changes nothing."""

    mean: float = 0.0
    deviation: float = 1.0

    @classmethod
    def measured(cls, scores: Sequence[float]) -> Self:
        """That which sets these scores to mean 0 and deviation 1."""
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
    """The rewards by the formula above; a row of the mask is ones, at least one, and then zeros."""
    rewards_N_T = -beta * (logprobs_N_T - ref_logprobs_N_T) * mask_N_T
    last_N = mask_N_T.sum(-1).long() - 1
    rewards_N_T[torch.arange(len(scores_N)), last_N] += scores_N
    return rewards_N_T
