"""Policies with so few answers that all can be enumerated, so that the optimum of training can be computed.

Their tokens are the characters of a short alphabet, and EOS. The probability of an answer is the product of the
policy's probabilities of its tokens, and the probabilities of all answers sum to 1.
"""

import itertools
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from tests.support.tiny_models import ENGINE_HEAD_DIM, save_tiny_policy

BETA = 0.5
LOGIT_SCALE = 0.25
"""Factor of a tiny policy's logits that makes its distribution nearly uniform."""


def symbol_tokenizer(symbols: str) -> Any:
    """One token for each symbol in their order, and EOS after them."""
    vocabulary = {symbol: token_id for token_id, symbol in enumerate([*symbols, "<eos>"])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<eos>", pad_token="<eos>", bos_token="<eos>", model_max_length=128
    )


@torch.inference_mode()
def distribution(policy: Any, prompt_ids: Sequence[int], answers: Sequence[Sequence[int]]) -> torch.Tensor:
    """The probability of each answer; `answers` are the token ids of all possible answers."""
    longest = max(map(len, answers))
    padded_N_T = torch.tensor([[*answer, *[0] * (longest - len(answer))] for answer in answers])
    mask_N_T = torch.tensor([[position < len(answer) for position in range(longest)] for answer in answers])
    prompts_N_P = torch.tensor([prompt_ids]).expand(len(answers), -1)
    logits_N_T_V = policy(torch.cat([prompts_N_P, padded_N_T], 1)).logits[:, len(prompt_ids) - 1 : -1]
    logprobs_N_T = logits_N_T_V.double().log_softmax(-1).gather(-1, padded_N_T[..., None])[..., 0]
    probabilities_N: torch.Tensor = (logprobs_N_T * mask_N_T).sum(-1).exp()
    assert float(probabilities_N.sum()) == pytest.approx(1.0, abs=1e-6)
    return probabilities_N


def optimum(reference_N: torch.Tensor, rewards_N: Sequence[float], beta: float) -> torch.Tensor:
    """pi_ref * exp(r / beta) / Z, the policy with the highest mean of r - beta * log(pi / pi_ref)."""
    return (reference_N.log() + torch.tensor(rewards_N, dtype=torch.float64) / beta).softmax(-1)


def total_variation(p_N: torch.Tensor, q_N: torch.Tensor) -> float:
    """The largest difference between the probabilities that two distributions give to an event."""
    return float((p_N - q_N).abs().sum() / 2)


@dataclass(frozen=True, slots=True)
class Problem:
    """All answers of `length` symbols with rewards in [-spread, spread], and a training run that solves it."""

    symbols: str
    length: int
    spread: float
    steps: int
    batch_size: int
    learning_rate: float


PROBLEMS = {
    "bandit of 4 arms": Problem("abcd", 1, 0.7, steps=40, batch_size=256, learning_rate=5e-3),
    "512 answers": Problem("abcdefgh", 3, 0.4, steps=140, batch_size=512, learning_rate=1.5e-2),
}


class RewardedAnswers:
    """One prompt, every answer to it with a reward, and a nearly uniform policy.

    The policy cannot sample EOS, so every answer ends by length.
    """

    def __init__(self, root: Path, problem: Problem) -> None:
        self._problem = problem
        symbols = problem.symbols
        self._answers = ["".join(chosen) for chosen in itertools.product(symbols, repeat=problem.length)]
        rng = random.Random(0)
        self.rewards = {answer: rng.uniform(-problem.spread, problem.spread) for answer in self._answers}
        self.prompts = root / "prompts.jsonl"
        self.prompts.write_text(json.dumps({"prompt": symbols[:2]}) + "\n")
        tokenizer = symbol_tokenizer(symbols)
        self._prompt_ids = tokenizer(symbols[:2])["input_ids"]
        self._answer_ids = [tokenizer(answer)["input_ids"] for answer in self._answers]
        self.base = root / "base"
        shape: dict[str, Any] = {
            "vocab_size": len(symbols),
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": None,
            "intermediate_size": 256,
            "head_dim": ENGINE_HEAD_DIM,
            "tie_word_embeddings": False,
        }
        save_tiny_policy(self.base, tokenizer=tokenizer, **shape)
        policy = AutoModelForCausalLM.from_pretrained(self.base)
        with torch.no_grad():
            policy.get_output_embeddings().weight.mul_(LOGIT_SCALE)
        policy.save_pretrained(self.base)

    @property
    def training(self) -> dict[str, Any]:
        """The settings of a training run that solves the problem."""
        problem = self._problem
        return {
            "base_model": str(self.base),
            "dtype": "float32",
            "kl_coef": BETA,
            "max_tokens": problem.length,
            "steps": problem.steps,
            "batch_size": problem.batch_size,
            "samples_per_prompt": 64,
            "learning_rate": problem.learning_rate,
        }

    def save_reward_function(self, path: Path) -> str:
        """Writes the rewards as a function into that file and returns its SPEC."""
        function = "def reward(prompt, completions):\n    return [REWARDS[text] for text in completions]\n"
        path.write_text(f"REWARDS = {self.rewards!r}\n\n\n{function}")
        return f"python:{path}:reward"

    def distance_to_optimum(self, adapter: Path | None = None) -> float:
        """The total variation between the policy with that adapter and the optimum."""
        policy = AutoModelForCausalLM.from_pretrained(self.base)
        reference_N = distribution(policy, self._prompt_ids, self._answer_ids)
        optimum_N = optimum(reference_N, [self.rewards[answer] for answer in self._answers], BETA)
        if adapter is None:
            return total_variation(reference_N, optimum_N)
        adapted = PeftModel.from_pretrained(policy, adapter)
        return total_variation(distribution(adapted, self._prompt_ids, self._answer_ids), optimum_N)
