"""How much better a token, or a completion, did than was to be expected.

PPO takes generalised advantage estimation (Schulman et al. 2015, arXiv 1506.02438), with gamma 1: nothing is gained by
being rewarded sooner. After a completion's last token the value is 0, also where the completion was cut.

REINFORCE takes the return of the whole completion against the mean of the others: those of the same prompt (RLOO,
Kool et al. 2019; Ahmadian et al. 2024, arXiv 2402.14740), or all of the batch. Leaving itself out keeps the gradient
unbiased.
"""

from collections.abc import Hashable, Sequence

import torch

SMALLEST_VARIANCE = 1e-8


def gae(rewards_N_T: torch.Tensor, values_N_T: torch.Tensor, mask_N_T: torch.Tensor, lambda_: float) -> torch.Tensor:
    """A_t = delta_t + lambda * A_(t+1), with delta_t = reward_t + value_(t+1) - value_t; 0 on padding."""
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
    """Mean 0 and variance 1 over the tokens that are no padding; 0 on padding."""
    count = mask_N_T.sum()
    mean = (values_N_T * mask_N_T).sum() / count
    centred_N_T = (values_N_T - mean) * mask_N_T
    return centred_N_T * (centred_N_T.square().sum() / count + SMALLEST_VARIANCE).rsqrt()


def leave_one_out(returns_N: torch.Tensor, groups_N: Sequence[Hashable]) -> torch.Tensor:
    """Each return less the mean of the others of its group; 0 where there is no other to compare with."""
    places: dict[Hashable, list[int]] = {}
    for place, group in enumerate(groups_N):
        places.setdefault(group, []).append(place)
    advantages_N = torch.zeros_like(returns_N)
    for members in places.values():
        if len(members) > 1:
            own = returns_N[members]
            advantages_N[members] = own - (own.sum() - own) / (len(members) - 1)
    return advantages_N
