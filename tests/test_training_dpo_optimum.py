"""DPO reaches what it should where it can be computed: a policy whose every answer can be listed.

The policy is a tiny Llama that learns with all its weights through `train_dpo`, as `nbest train dpo --full` does. Its
vocabulary has five tokens, EOS among them, and an answer is at most two tokens long: it ends by itself, or it is cut
there. That makes 1 + 4 + 4 * 4 = 21 answers, whose probabilities sum to 1 whatever the weights.

Rewards are logarithms of whole numbers, r = log w. Then Bradley and Terry's model says that answer i is preferred to j
with probability w_i / (w_i + w_j), so a file in which i is chosen over j in w_i lines and j over i in w_j lines holds
these preferences exactly, and no sampling noise.
"""

import itertools
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from tests.tiny_models import save_tiny_policy
from training.dpo import DPOTraining, train_dpo
from training.policy import RunOptions

SYMBOLS = "abcd"
PROMPT = "ab"
BETA = 0.5
COMPARED_WITH = 4
"""Answers that each is compared with, at least; a connected graph of comparisons is all that the optimum needs."""


def tokenizer() -> Any:
    """One token for each symbol, and EOS."""
    vocabulary = {symbol: place for place, symbol in enumerate([*SYMBOLS, "<eos>"])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<eos>", pad_token="<eos>", bos_token="<eos>", model_max_length=128
    )


ANSWERS = ["", *SYMBOLS, *("".join(pair) for pair in itertools.product(SYMBOLS, repeat=2))]


def distribution(policy: Any) -> torch.Tensor:
    """The probability of every answer, in the order of ANSWERS, by the chain rule over the policy's own numbers."""
    eos = len(SYMBOLS)
    contexts = [[SYMBOLS.index(symbol) for symbol in PROMPT + first] for first in ("", *SYMBOLS)]
    with torch.inference_mode():
        next_token = [policy(torch.tensor([context])).logits[0, -1].double().softmax(-1) for context in contexts]
    first = next_token[0]
    probabilities = [first[eos]]
    probabilities += [first[SYMBOLS.index(a)] * next_token[1 + SYMBOLS.index(a)][eos] for a in SYMBOLS]
    probabilities += [
        first[SYMBOLS.index(a)] * next_token[1 + SYMBOLS.index(a)][SYMBOLS.index(b)]
        for a, b in itertools.product(SYMBOLS, repeat=2)
    ]
    found = torch.stack(probabilities)
    assert float(found.sum()) == pytest.approx(1.0, abs=1e-6)
    return found


def finish_reason(answer: str) -> str:
    return "length" if len(answer) == 2 else "stop"


def preferences(weights: list[int], rng: random.Random) -> Iterator[dict[str, str]]:
    """Exact preferences between each answer and some others."""
    compared: set[tuple[int, int]] = set()
    for one in range(len(ANSWERS)):
        others = [other for other in range(len(ANSWERS)) if other != one]
        compared |= {(min(one, other), max(one, other)) for other in rng.sample(others, COMPARED_WITH)}
    for pair in sorted(compared):
        for chosen, rejected in (pair, pair[::-1]):
            yield from [
                {
                    "prompt": PROMPT,
                    "chosen": ANSWERS[chosen],
                    "rejected": ANSWERS[rejected],
                    "chosen_finish_reason": finish_reason(ANSWERS[chosen]),
                    "rejected_finish_reason": finish_reason(ANSWERS[rejected]),
                }
            ] * weights[chosen]


def test_dpo_with_exact_preferences_reaches_the_optimum_of_rlhf(tmp_path: Path) -> None:
    """pi_ref * exp(r / beta) / Z, of which w^(1 / beta) is exp(r / beta); total variation below .03."""
    rng = random.Random(0)
    weights = [rng.choice([1, 2, 3]) for _ in ANSWERS]
    base = save_tiny_policy(tmp_path / "base", tokenizer=tokenizer())
    data = tmp_path / "preferences.jsonl"
    lines = [json.dumps(line) + "\n" for line in preferences(weights, rng)]
    data.write_text("".join(lines))
    settings = DPOTraining(
        base_model=str(base),
        full=True,
        beta=BETA,
        epochs=120,
        batch_size=len(lines),
        learning_rate=1e-2,
        dtype="float32",
    )
    written = train_dpo(data, tmp_path / "out", settings, RunOptions(progress=False), holdout=0)
    reference = distribution(AutoModelForCausalLM.from_pretrained(base))
    optimum = reference * torch.tensor(weights, dtype=torch.float64) ** (1 / BETA)
    optimum /= optimum.sum()
    reached = distribution(AutoModelForCausalLM.from_pretrained(written))
    assert total_variation(reference, optimum) > 0.2, "there would be nothing to learn"
    assert total_variation(reached, optimum) < 0.03


def total_variation(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().sum() / 2)
