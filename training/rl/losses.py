"""The losses of PPO and REINFORCE, of each token; `token_mean` makes the one number that is minimised.

PPO (Schulman et al. 2017, arXiv 1707.06347): with ratio = pi / pi_old, the larger of -ratio * A and
-clip(ratio, 1 - c, 1 + c) * A; the values are clipped about the old ones in the same way. REINFORCE: -log pi * A.

Three policies are told apart, as by Hilton et al. 2021 (arXiv 2110.00641): pi_drawn, which the engine drew with;
pi_old, the learner's before it learns from the batch, which the clip keeps pi near to; and pi. What lies between the
first two is put right by importance weights pi_old / pi_drawn, cut off above so that no single token counts for many
(truncated importance sampling, Espeholt et al. 2018, arXiv 1802.01561). In turn that is rounding alone, for the engine
rounds in other places than the trainer does. Where drawing overlaps learning, pi_old is one step newer than pi_drawn:
the weights let the batch count as if pi_old had drawn it, and a clip about pi_drawn would undo the step between the
two. A weight is of a token given those before it. That these were chosen by the older policy too is left as it is, an
error as small as the step.

What logits say of the tokens that were drawn. V is the vocabulary, by far the widest dimension of a learner.
"""

import torch
import torch.nn.functional as F


def token_logprobs(logits_N_T_V: torch.Tensor, token_ids_N_T: torch.Tensor) -> torch.Tensor:
    """log softmax(logits) of each token, in nats; differentiable."""
    nats = F.cross_entropy(logits_N_T_V.flatten(0, 1), token_ids_N_T.flatten(), reduction="none")
    return -nats.view_as(token_ids_N_T)


@torch.no_grad()
def entropies(logits_N_T_V: torch.Tensor) -> torch.Tensor:
    """Of softmax(logits) at each token, in nats; row by row, so that no more of the width is in memory twice."""
    rows = []
    for logits_T_V in logits_N_T_V:
        logprobs_T_V = logits_T_V.log_softmax(-1)
        rows.append(-(logprobs_T_V.exp() * logprobs_T_V).sum(-1))
    return torch.stack(rows)


def policy_loss(
    logprobs_N_T: torch.Tensor, old_logprobs_N_T: torch.Tensor, advantages_N_T: torch.Tensor, clip: float
) -> torch.Tensor:
    """PPO's clipped loss of each token."""
    ratio_N_T = (logprobs_N_T - old_logprobs_N_T).exp()
    clipped_N_T = ratio_N_T.clamp(1 - clip, 1 + clip)
    return torch.maximum(-ratio_N_T * advantages_N_T, -clipped_N_T * advantages_N_T)


def value_loss(
    values_N_T: torch.Tensor, old_values_N_T: torch.Tensor, returns_N_T: torch.Tensor, clip: float
) -> torch.Tensor:
    """Half the squared error of each token's value, clipped about the old value where that is worse."""
    clipped_N_T = old_values_N_T + (values_N_T - old_values_N_T).clamp(-clip, clip)
    return torch.maximum((values_N_T - returns_N_T).square(), (clipped_N_T - returns_N_T).square()) / 2


def reinforce_loss(logprobs_N_T: torch.Tensor, advantages_N_T: torch.Tensor) -> torch.Tensor:
    """Its gradient is that of the expected return."""
    return -logprobs_N_T * advantages_N_T


def importance_weights(
    old_logprobs_N_T: torch.Tensor, drawn_logprobs_N_T: torch.Tensor, largest: float
) -> torch.Tensor:
    """pi_old / pi_drawn of each token, at most `largest`."""
    return (old_logprobs_N_T - drawn_logprobs_N_T).exp().clamp(max=largest)


def token_mean(losses_N_T: torch.Tensor, mask_N_T: torch.Tensor, num_tokens: float) -> torch.Tensor:
    """The sum over real tokens by the tokens of the whole batch, of which these rows may be a part.

    Parts of any size then add up to the gradient of the batch; a mean of means would weigh the tokens of short
    completions more.
    """
    return (losses_N_T * mask_N_T).sum() / num_tokens


def explained_variance(values_N_T: torch.Tensor, returns_N_T: torch.Tensor, mask_N_T: torch.Tensor) -> float:
    """1 - Var(returns - values) / Var(returns) over real tokens: 1 is perfect, 0 as good as a constant."""
    kept = mask_N_T.bool()
    returns, errors = returns_N_T[kept], (returns_N_T - values_N_T)[kept]
    variance = returns.var(unbiased=False)
    return float(1 - errors.var(unbiased=False) / variance) if variance > 0 else 0.0
