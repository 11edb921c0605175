"""How far the policy is from its reference, and what that costs.

With y drawn from the policy and d = log pi(y) - log pi_ref(y) of a token, the KL divergence of completions is the mean
of d summed over their tokens. Three estimators of it (Schulman 2020, "Approximating KL divergence"):

    k1 = d                  unbiased, of either sign
    k2 = d^2 / 2            biased, never negative, of little variance
    k3 = exp(-d) - 1 + d    unbiased, never negative

The price of a nat, beta, is fixed, or follows a target as in Ziegler et al. 2019 (arXiv 1909.08593): after n
completions of that mean KL it becomes beta * (1 + clip(KL / target - 1, -.2, .2) * n / horizon).
"""

from dataclasses import dataclass

import torch

LARGEST_ERROR = 0.2
"""What the relative error of the KL is clipped to, so that one odd batch moves beta little."""


@dataclass(frozen=True, slots=True)
class KLEstimates:
    """Mean over completions of the sum over their tokens, in nats."""

    k1: float
    k2: float
    k3: float


def estimate_kl(logprobs_N_T: torch.Tensor, ref_logprobs_N_T: torch.Tensor, mask_N_T: torch.Tensor) -> KLEstimates:
    """The three estimates from the tokens that were drawn; `mask` is 0 on padding."""
    d_N_T = (logprobs_N_T - ref_logprobs_N_T) * mask_N_T  # 0 on padding, where all three are then 0

    def mean_sum(values_N_T: torch.Tensor) -> float:
        return float(values_N_T.sum(-1).mean())

    return KLEstimates(mean_sum(d_N_T), mean_sum(d_N_T**2 / 2), mean_sum((-d_N_T).exp() - 1 + d_N_T))


@dataclass(slots=True)
class KLController:
    """Holds beta; without a `target` it stays as it is."""

    beta: float
    target: float | None = None
    horizon: int = 10_000

    def observe(self, kl: float, completions: int) -> None:
        """Moves beta towards what holds the mean KL of a completion at the target."""
        if self.target is not None:
            error = min(max(kl / self.target - 1, -LARGEST_ERROR), LARGEST_ERROR)
            self.beta *= 1 + error * completions / self.horizon
