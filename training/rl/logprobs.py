"""What logits say of the tokens that were drawn. V is the vocabulary, by far the widest dimension of a learner."""

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
