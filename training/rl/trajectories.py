"""What the rollout worker hands to the learner: completions, and the same in padded rows.

Prompts are padded on the left and completions on the right, so that all completions begin in the same column, and the
logits that predict them are the last ones of every row.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch

PADDING_ID = 0
"""Any token there is will do: what is padding the masks tell."""


@dataclass(frozen=True, slots=True)
class Completion:
    """One sample of the policy, token in, token out.

    `drawn_logprobs` are the engine's, of each token, in nats. `reward` is the scorer's, `score` what is learnt from:
    scaled, and less the penalty where `is_cut`. `group` is the place of its prompt in the batch. `judged` is what the
    judge says of it, NaN where there is none.
    """

    prompt_ids: Sequence[int]
    token_ids: Sequence[int]
    drawn_logprobs: Sequence[float]
    text: str
    reward: float
    score: float
    group: int
    is_cut: bool
    judged: float = math.nan


@dataclass(frozen=True, slots=True)
class Rows:
    """Completions as a policy reads them; T counts the tokens of the longest completion, L those of the whole rows."""

    input_ids_N_L: torch.Tensor
    attention_mask_N_L: torch.Tensor
    token_ids_N_T: torch.Tensor
    mask_N_T: torch.Tensor

    @classmethod
    def of(cls, completions: Sequence[Completion], device: torch.device) -> Self:
        longest_prompt = max(len(one.prompt_ids) for one in completions)
        prompts = [_padded(one.prompt_ids, longest_prompt, left=True) for one in completions]
        longest = max(len(one.token_ids) for one in completions)
        answers = [_padded(one.token_ids, longest, left=False) for one in completions]
        prompt_ids, prompt_mask, token_ids, mask = (
            torch.tensor(part, device=device) for pairs in (prompts, answers) for part in zip(*pairs, strict=True)
        )
        return cls(torch.cat([prompt_ids, token_ids], 1), torch.cat([prompt_mask, mask], 1), token_ids, mask.float())


def drawn_logprobs(completions: Sequence[Completion], device: torch.device) -> torch.Tensor:
    """The engine's log-probabilities in rows, 0 on padding."""
    longest = max(len(one.token_ids) for one in completions)
    rows = [[*one.drawn_logprobs, *[0.0] * (longest - len(one.token_ids))] for one in completions]
    return torch.tensor(rows, device=device)


def _padded(token_ids: Sequence[int], length: int, *, left: bool) -> tuple[list[int], list[int]]:
    """(tokens, mask)."""
    padding = length - len(token_ids)
    if left:
        return [PADDING_ID] * padding + list(token_ids), [0] * padding + [1] * len(token_ids)
    return list(token_ids) + [PADDING_ID] * padding, [1] * len(token_ids) + [0] * padding
