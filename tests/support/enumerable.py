"""Policies whose every answer can be listed, so that what training is to reach can be computed.

Their tokens are the characters of a short alphabet, and EOS. The probability of an answer is the product of those of
its tokens by the policy's own numbers, and the probabilities of all answers sum to 1.
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
CALM = 0.25
"""What a tiny policy's logits are scaled by to be near to uniform."""


def symbol_tokenizer(symbols: str) -> Any:
    """One token for each symbol in their order, and EOS after them."""
    vocabulary = {symbol: place for place, symbol in enumerate([*symbols, "<eos>"])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<eos>", pad_token="<eos>", bos_token="<eos>", model_max_length=128
    )


@torch.inference_mode()
def distribution(policy: Any, prompt_ids: Sequence[int], answers: Sequence[Sequence[int]]) -> torch.Tensor:
    """The probability of each answer, told in tokens; they must be all there are."""
    longest = max(map(len, answers))
    padded_N_T = torch.tensor([[*answer, *[0] * (longest - len(answer))] for answer in answers])
    mask_N_T = torch.tensor([[place < len(answer) for place in range(longest)] for answer in answers])
    prompts_N_P = torch.tensor([prompt_ids]).expand(len(answers), -1)
    logits_N_T_V = policy(torch.cat([prompts_N_P, padded_N_T], 1)).logits[:, len(prompt_ids) - 1 : -1]
    logprobs_N_T = logits_N_T_V.double().log_softmax(-1).gather(-1, padded_N_T[..., None])[..., 0]
    found_N: torch.Tensor = (logprobs_N_T * mask_N_T).sum(-1).exp()
    assert float(found_N.sum()) == pytest.approx(1.0, abs=1e-6)
    return found_N


def optimum(reference_N: torch.Tensor, rewards_N: Sequence[float], beta: float) -> torch.Tensor:
    """pi_ref * exp(r / beta) / Z: no policy has a higher mean of r - beta * log(pi / pi_ref)."""
    return (reference_N.log() + torch.tensor(rewards_N, dtype=torch.float64) / beta).softmax(-1)


def total_variation(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference that the two can have in the probability of an event."""
    return float((one - other).abs().sum() / 2)


@dataclass(frozen=True, slots=True)
class Lesson:
    """A world of answers of `length` symbols with rewards from -spread to spread, and what is enough to learn it."""

    symbols: str
    length: int
    spread: float
    steps: int
    batch_size: int
    learning_rate: float


LESSONS = {
    "bandit of 4 arms": Lesson("abcd", 1, 0.7, steps=40, batch_size=256, learning_rate=5e-3),
    "512 answers": Lesson("abcdefgh", 3, 0.4, steps=140, batch_size=512, learning_rate=1.5e-2),
}


class RewardedAnswers:
    """One prompt, every answer to it, a reward for each, and a policy that is near to uniform.

    The policy has no EOS to say, so every answer is cut at its length.
    """

    def __init__(self, root: Path, lesson: Lesson) -> None:
        self._lesson = lesson
        symbols = lesson.symbols
        self._answers = ["".join(chosen) for chosen in itertools.product(symbols, repeat=lesson.length)]
        rng = random.Random(0)
        self.rewards = {answer: rng.uniform(-lesson.spread, lesson.spread) for answer in self._answers}
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
            policy.get_output_embeddings().weight.mul_(CALM)
        policy.save_pretrained(self.base)

    @property
    def training(self) -> dict[str, Any]:
        """Fields of the settings of a run that learns it."""
        lesson = self._lesson
        return {
            "base_model": str(self.base),
            "dtype": "float32",
            "kl_coef": BETA,
            "max_tokens": lesson.length,
            "steps": lesson.steps,
            "batch_size": lesson.batch_size,
            "samples_per_prompt": 64,
            "learning_rate": lesson.learning_rate,
        }

    def save_reward_function(self, path: Path) -> str:
        """The SPEC of the reward as a function in that file."""
        function = "def reward(prompt, completions):\n    return [REWARDS[one] for one in completions]\n"
        path.write_text(f"REWARDS = {self.rewards!r}\n\n\n{function}")
        return f"python:{path}:reward"

    def distance_to_optimum(self, adapter: Path | None = None) -> float:
        """The total variation between the policy with that adapter and what it should become."""
        policy = AutoModelForCausalLM.from_pretrained(self.base)
        reference_N = distribution(policy, self._prompt_ids, self._answer_ids)
        goal_N = optimum(reference_N, [self.rewards[answer] for answer in self._answers], BETA)
        if adapter is None:
            return total_variation(reference_N, goal_N)
        adapted = PeftModel.from_pretrained(policy, adapter)
        return total_variation(distribution(adapted, self._prompt_ids, self._answer_ids), goal_N)
