"""The KL divergence of the policy from its reference: its estimators, and its coefficient beta.

With y sampled from the policy and d = log pi(y) - log pi_ref(y) of a token, the KL divergence of completions is the
mean of d summed over their tokens. Three estimators of it (Schulman 2020, "Approximating KL divergence"):

    k1 = d                  unbiased, of either sign
    k2 = d^2 / 2            biased, never negative, of low variance
    k3 = exp(-d) - 1 + d    unbiased, never negative

beta, the reward that one nat costs, is fixed, or adapts to a target as in Ziegler et al. 2019 (arXiv 1909.08593): after
n completions of mean KL it becomes beta * (1 + clip(KL / target - 1, -.2, .2) * n / horizon).
"""

from dataclasses import dataclass

import torch

LARGEST_ERROR = 0.2
"""The bound of the relative error of the KL, so that an outlying batch changes beta only a little."""


@dataclass(frozen=True, slots=True)
class KLEstimates:
    """Means over completions of sums over their tokens, in nats."""

    k1: float
    k2: float
    k3: float


def estimate_kl(logprobs_N_T: torch.Tensor, ref_logprobs_N_T: torch.Tensor, mask_N_T: torch.Tensor) -> KLEstimates:
    """The three estimates from the sampled tokens; `mask_N_T` is 0 on padding."""
    d_N_T = (logprobs_N_T - ref_logprobs_N_T) * mask_N_T  # with d = 0 on padding, all three are 0 there

    def mean_sum(values_N_T: torch.Tensor) -> float:
        return float(values_N_T.sum(-1).mean())

    return KLEstimates(mean_sum(d_N_T), mean_sum(d_N_T**2 / 2), mean_sum((-d_N_T).exp() - 1 + d_N_T))


@dataclass(slots=True)
class KLController:
    """Holds beta and adapts it to `target`, in nats per completion; without a target beta is constant."""

    beta: float
    target: float | None = None
    horizon: int = 10_000

    def observe(self, kl: float, completions: int) -> None:
        """Raises beta if the mean KL of these completions is above the target, and lowers it if it is below."""
        if self.target is not None:
            error = min(max(kl / self.target - 1, -LARGEST_ERROR), LARGEST_ERROR)
            self.beta *= 1 + error * completions / self.horizon
