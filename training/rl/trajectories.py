"""What the rollout worker passes to the learner: scored completions, and their padded form.

Prompts are padded on the left and completions on the right. So all completions begin in the same column, and the logits
that predict their tokens are the last ones of every row.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch

PADDING_ID = 0
"""Any token of the vocabulary serves: the masks mark the padding."""


@dataclass(frozen=True, slots=True)
class Completion:
    """One sample of the policy, in tokens.

    `drawn_logprobs` are the engine's log-probabilities of each token, in nats. `reward` is the scorer's. `score` is
    what is learnt from: the scaled reward, minus the truncation penalty if `is_cut`. `group` is the index of the prompt
    in the batch. `judged` is the judge's reward, NaN without a judge.
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
class PaddedBatch:
    """N completions for the model: T is the tokens of the longest completion, L the tokens of a whole row."""

    input_ids_N_L: torch.Tensor
    attention_mask_N_L: torch.Tensor
    token_ids_N_T: torch.Tensor
    mask_N_T: torch.Tensor

    @classmethod
    def of(cls, completions: Sequence[Completion], device: torch.device) -> Self:
        longest_prompt = max(len(completion.prompt_ids) for completion in completions)
        prompts = [_padded(completion.prompt_ids, longest_prompt, left=True) for completion in completions]
        longest = max(len(completion.token_ids) for completion in completions)
        answers = [_padded(completion.token_ids, longest, left=False) for completion in completions]
        prompt_ids, prompt_mask, token_ids, mask = (
            torch.tensor(part, device=device) for pairs in (prompts, answers) for part in zip(*pairs, strict=True)
        )
        return cls(torch.cat([prompt_ids, token_ids], 1), torch.cat([prompt_mask, mask], 1), token_ids, mask.float())


def drawn_logprobs(completions: Sequence[Completion], device: torch.device) -> torch.Tensor:
    """drawn_logprobs_N_T: the engine's log-probabilities, 0 on padding."""
    longest = max(len(completion.token_ids) for completion in completions)
    rows = [[*completion.drawn_logprobs, *[0.0] * (longest - len(completion.token_ids))] for completion in completions]
    return torch.tensor(rows, device=device)


def _padded(token_ids: Sequence[int], length: int, *, left: bool) -> tuple[list[int], list[int]]:
    """(tokens, mask), both of `length`."""
    padding = length - len(token_ids)
    if left:
        return [PADDING_ID] * padding + list(token_ids), [0] * padding + [1] * len(token_ids)
    return list(token_ids) + [PADDING_ID] * padding, [1] * len(token_ids) + [0] * padding
