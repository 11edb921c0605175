"""The losses of PPO and REINFORCE per token; `token_mean` reduces them to the number that is minimised.

PPO (Schulman et al. 2017, arXiv 1707.06347): with ratio = pi / pi_old, the larger of -ratio * A and
-clip(ratio, 1 - c, 1 + c) * A; the values are clipped around the old values in the same way. REINFORCE: -log pi * A.

There are three policies, as in Hilton et al. 2021 (arXiv 2110.00641): pi_drawn, with which the engine sampled; pi_old,
the learner's policy before it learns from the batch, near which the clip keeps pi; and pi. The difference between the
first two is corrected by importance weights pi_old / pi_drawn, truncated above so that no single token dominates
(truncated importance sampling, Espeholt et al. 2018, arXiv 1802.01561). Without overlap the difference is rounding
alone, since engine and learner round at different points. With overlap pi_old is one step newer than pi_drawn: the
weights make the batch count as if pi_old had sampled it, whereas a clip around pi_drawn would undo that step. A weight
is that of a token given the tokens before it. The tokens before it were sampled by pi_drawn too; this is not corrected,
an error as small as the step.

In the shape letters, N is completions, T their tokens, and V the vocabulary, by far the largest dimension of a learner.
"""

import torch
import torch.nn.functional as F


def token_logprobs(logits_N_T_V: torch.Tensor, token_ids_N_T: torch.Tensor) -> torch.Tensor:
    """logprobs_N_T: log softmax(logits) of each token, in nats; differentiable."""
    nats = F.cross_entropy(logits_N_T_V.flatten(0, 1), token_ids_N_T.flatten(), reduction="none")
    return -nats.view_as(token_ids_N_T)


@torch.no_grad()
def entropies(logits_N_T_V: torch.Tensor) -> torch.Tensor:
    """entropies_N_T of softmax(logits), in nats; computed row by row, so that only one row of width V is copied."""
    rows = []
    for logits_T_V in logits_N_T_V:
        logprobs_T_V = logits_T_V.log_softmax(-1)
        rows.append(-(logprobs_T_V.exp() * logprobs_T_V).sum(-1))
    return torch.stack(rows)


def policy_loss(
    logprobs_N_T: torch.Tensor, old_logprobs_N_T: torch.Tensor, advantages_N_T: torch.Tensor, clip: float
) -> torch.Tensor:
    """PPO's clipped loss per token."""
    ratio_N_T = (logprobs_N_T - old_logprobs_N_T).exp()
    clipped_N_T = ratio_N_T.clamp(1 - clip, 1 + clip)
    return torch.maximum(-ratio_N_T * advantages_N_T, -clipped_N_T * advantages_N_T)


def value_loss(
    values_N_T: torch.Tensor, old_values_N_T: torch.Tensor, returns_N_T: torch.Tensor, clip: float
) -> torch.Tensor:
    """Half the squared error of each token's value, or of the value clipped around the old one if that is larger."""
    clipped_N_T = old_values_N_T + (values_N_T - old_values_N_T).clamp(-clip, clip)
    return torch.maximum((values_N_T - returns_N_T).square(), (clipped_N_T - returns_N_T).square()) / 2


def reinforce_loss(logprobs_N_T: torch.Tensor, advantages_N_T: torch.Tensor) -> torch.Tensor:
    """REINFORCE's loss per token; its gradient is that of the expected return, with the sign changed."""
    return -logprobs_N_T * advantages_N_T


def importance_weights(
    old_logprobs_N_T: torch.Tensor, drawn_logprobs_N_T: torch.Tensor, largest: float
) -> torch.Tensor:
    """weights_N_T: pi_old / pi_drawn per token, at most `largest`."""
    return (old_logprobs_N_T - drawn_logprobs_N_T).exp().clamp(max=largest)


def token_mean(losses_N_T: torch.Tensor, mask_N_T: torch.Tensor, num_tokens: float) -> torch.Tensor:
    """The sum over all tokens but padding, divided by `num_tokens`, the tokens of the whole minibatch.

    The rows may be a part of the minibatch: parts of any size add up to its gradient. A mean of the parts' means would
    give the tokens of short completions more weight.
    """
    return (losses_N_T * mask_N_T).sum() / num_tokens


def explained_variance(values_N_T: torch.Tensor, returns_N_T: torch.Tensor, mask_N_T: torch.Tensor) -> float:
    """1 - Var(returns - values) / Var(returns) over all tokens but padding: 1 is perfect, 0 as good as a constant."""
    kept = mask_N_T.bool()
    returns, errors = returns_N_T[kept], (returns_N_T - values_N_T)[kept]
    variance = returns.var(unbiased=False)
    return float(1 - errors.var(unbiased=False) / variance) if variance > 0 else 0.0
