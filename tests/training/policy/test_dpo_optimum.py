"""DPO reaches its optimum where the optimum can be computed: for a policy with a list of all possible answers.

The policy is a tiny Llama, all of whose weights are trained by `train_dpo`, as by `nbest train dpo --full`. Its
vocabulary has five tokens, EOS among them, and an answer has at most two tokens: it ends with EOS, or it is cut after
the second. That makes 1 + 4 + 4 * 4 = 21 answers, whose probabilities sum to 1 for any weights.

Rewards are logarithms of whole numbers, r = log w. By Bradley and Terry's model, answer i is then preferred to j with
probability w_i / (w_i + w_j). So a file in which i is chosen over j in w_i lines, and j over i in w_j lines, holds
these preferences exactly, without sampling noise.
"""

import itertools
import json
import random
from collections.abc import Iterator
from math import log
from pathlib import Path

from transformers import AutoModelForCausalLM

from tests.support.enumerable import distribution, optimum, symbol_tokenizer, total_variation
from tests.support.tiny_models import save_tiny_policy
from training.policy.config import DPOTraining, RunOptions
from training.policy.dpo import train_dpo

SYMBOLS = "abcd"
PROMPT = "ab"
BETA = 0.5
COMPARED_WITH = 4
"""The least number of answers that each answer is compared with; the optimum needs a connected graph of comparisons."""


ANSWERS = ["", *SYMBOLS, *("".join(pair) for pair in itertools.product(SYMBOLS, repeat=2))]


def token_ids(answer: str) -> list[int]:
    """The tokens of an answer, closed by EOS unless it is cut."""
    symbol_ids = [SYMBOLS.index(symbol) for symbol in answer]
    return symbol_ids if finish_reason(answer) == "length" else [*symbol_ids, len(SYMBOLS)]


def finish_reason(answer: str) -> str:
    return "length" if len(answer) == 2 else "stop"


def preferences(weights: list[int], rng: random.Random) -> Iterator[dict[str, str]]:
    """Lines of exact preferences between each answer and some others."""
    compared: set[tuple[int, int]] = set()
    for index in range(len(ANSWERS)):
        others = [other for other in range(len(ANSWERS)) if other != index]
        compared |= {(min(index, other), max(index, other)) for other in rng.sample(others, COMPARED_WITH)}
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
    """The optimum is pi_ref * exp(r / beta) / Z; the total variation to it is below .03."""
    rng = random.Random(0)
    weights = [rng.choice([1, 2, 3]) for _ in ANSWERS]
    base = save_tiny_policy(tmp_path / "base", tokenizer=symbol_tokenizer(SYMBOLS))
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
    prompt_ids, answers = [SYMBOLS.index(symbol) for symbol in PROMPT], [token_ids(answer) for answer in ANSWERS]
    reference = distribution(AutoModelForCausalLM.from_pretrained(base), prompt_ids, answers)
    trained = distribution(AutoModelForCausalLM.from_pretrained(written), prompt_ids, answers)
    optimal = optimum(reference, [log(weight) for weight in weights], BETA)
    assert total_variation(reference, optimal) > 0.2, "there would be nothing to learn"
    assert total_variation(trained, optimal) < 0.03
