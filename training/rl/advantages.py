"""Advantages: how much better a token, or a completion, did than expected.

PPO uses generalised advantage estimation (Schulman et al. 2015, arXiv 1506.02438) with gamma 1, so later rewards are
not discounted. The value after the last token of a completion is 0, also where the completion was cut.

REINFORCE compares the return of a completion with the mean return of others: those of the same prompt (RLOO, Kool et
al. 2019; Ahmadian et al. 2024, arXiv 2402.14740), or all of the batch. The completion itself is left out of the mean,
which keeps the gradient unbiased.
"""

from collections.abc import Hashable, Sequence

import torch

SMALLEST_VARIANCE = 1e-8


def gae(rewards_N_T: torch.Tensor, values_N_T: torch.Tensor, mask_N_T: torch.Tensor, lambda_: float) -> torch.Tensor:
    """advantages_N_T: A_t = delta_t + lambda * A_(t+1), delta_t = reward_t + value_(t+1) - value_t; 0 on padding."""
    values_N_T = values_N_T * mask_N_T  # so that the value after the last token is 0
    advantages_N_T = torch.zeros_like(rewards_N_T)
    next_advantage_N = next_value_N = torch.zeros_like(rewards_N_T[:, 0])
    for t in reversed(range(rewards_N_T.shape[1])):
        delta_N = rewards_N_T[:, t] + next_value_N - values_N_T[:, t]
        next_advantage_N = (delta_N + lambda_ * next_advantage_N) * mask_N_T[:, t]
        next_value_N = values_N_T[:, t]
        advantages_N_T[:, t] = next_advantage_N
    return advantages_N_T


def whiten(values_N_T: torch.Tensor, mask_N_T: torch.Tensor) -> torch.Tensor:
    """The values scaled to mean 0 and variance 1 over all tokens but padding; 0 on padding."""
    count = mask_N_T.sum()
    mean = (values_N_T * mask_N_T).sum() / count
    centred_N_T = (values_N_T - mean) * mask_N_T
    return centred_N_T * (centred_N_T.square().sum() / count + SMALLEST_VARIANCE).rsqrt()


def leave_one_out(returns_N: torch.Tensor, groups_N: Sequence[Hashable]) -> torch.Tensor:
    """advantages_N: each return minus the mean of the others in its group; 0 in a group of one."""
    indexes_by_group: dict[Hashable, list[int]] = {}
    for index, group in enumerate(groups_N):
        indexes_by_group.setdefault(group, []).append(index)
    advantages_N = torch.zeros_like(returns_N)
    for indexes in indexes_by_group.values():
        if len(indexes) > 1:
            returns = returns_N[indexes]
            advantages_N[indexes] = returns - (returns.sum() - returns) / (len(indexes) - 1)
    return advantages_N
