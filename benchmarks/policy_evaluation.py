"""Evaluation of a policy on openings of film reviews, by its training reward and by measures it was not trained on.

A sample has its reward, its VADER score (-1 to 1), which no policy was trained on, and its log-probabilities under the
policy that sampled it and under the base policy. KL(policy || base), in nats a sequence, is the mean of their
difference. Perplexity under the base measures how fluent the text is to an untrained policy.
"""

import json
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from benchmarks.sequence_likelihood import log_probs
from reranker import estimators
from reranker.models.bundled import resolve

MODEL = "smollm2-135m-instruct"
MAX_TOKENS = 32
N = (1, 2, 4, 8, 16, 32)
SAMPLES = 4
"""Samples of each opening from every trained policy."""


@dataclass(frozen=True, slots=True)
class JudgedSample:
    """A continuation of an opening with its scores.

    `base_nats` and `nats` are its log-probabilities under the base and under the policy that sampled it.
    """

    prompt: str
    text: str
    reward: float
    vader: float
    tokens: int
    base_nats: float
    nats: float


Pools = list[list[JudgedSample]]
"""The samples of each prompt."""


def nbest(*arguments: str) -> None:
    """Runs the `nbest` command of this environment."""
    subprocess.run([Path(sys.executable).with_name("nbest"), *arguments], check=True)


def write_openings(path: Path, openings: Sequence[str]) -> Path:
    path.write_text("".join(json.dumps({"prompt": opening}) + "\n" for opening in openings))
    return path


def sample(held_out: Path, out: Path, model: str, best_of: int, seed: str) -> None:
    """Runs `nbest batch` with the embedded reward model; an interrupted run continues."""
    if not (out / "summary.json").exists():
        options = ("--best-of", str(best_of), "--max-tokens", str(MAX_TOKENS), "--temperature", "1.0", "--seed", seed)
        nbest("batch", str(held_out), "--out", str(out), "--model", model, *options)


def read(out: Path, name: str, model: str, directory: Path, base: str = MODEL) -> Pools:
    """The samples of a policy with their scores; cached in OUT/judged, because the log-probabilities take a while."""
    cache = out / "judged" / f"{name}.json"
    if not cache.exists():
        results = [json.loads(line) for line in (directory / "results.jsonl").read_text().splitlines()]
        results.sort(key=lambda result: result["line"])
        candidates = [(result["prompt"], candidate) for result in results for candidate in result["candidates"]]
        texts = [(prompt, candidate["text"], candidate["finish_reason"] == "stop") for prompt, candidate in candidates]
        of_base = log_probs(resolve(base), texts)
        of_policy = of_base if model == base else log_probs(model, texts)
        vader = SentimentIntensityAnalyzer()
        samples = [
            JudgedSample(
                prompt=prompt,
                text=candidate["text"],
                reward=candidate["reward"],
                vader=vader.polarity_scores(prompt + candidate["text"])["compound"],
                tokens=tokens,
                base_nats=round(base_nats, 4),
                nats=round(nats, 4),
            )
            for (prompt, candidate), (base_nats, tokens), (nats, _) in zip(candidates, of_base, of_policy, strict=True)
        ]
        cache.parent.mkdir(exist_ok=True)
        cache.write_text(json.dumps([asdict(sample) for sample in samples]))
    pools: dict[str, list[JudgedSample]] = {}
    for fields in json.loads(cache.read_text()):
        pools.setdefault(fields["prompt"], []).append(JudgedSample(**fields))
    return list(pools.values())


def best_of(pool: Sequence[JudgedSample], n: int, value: Callable[[JudgedSample], float]) -> float:
    """The expectation of `value` of the sample with the highest reward among n of the pool."""
    rewards, values = [sample.reward for sample in pool], [value(sample) for sample in pool]
    return estimators.expected_value_of_best(rewards, values, n)


def nats_per_token(sample: JudgedSample) -> float:
    """Negative log-probability of a token under the base policy, in nats; 0 for an empty text."""
    return -sample.base_nats / sample.tokens if sample.tokens else 0.0


MEASURES: dict[str, Callable[[JudgedSample], float]] = {
    "reward": lambda sample: sample.reward,
    "vader": lambda sample: sample.vader,
    "base_nats_a_token": nats_per_token,
    "kl": lambda sample: sample.nats - sample.base_nats,
}


def measured(pools: Pools, n: int) -> dict[str, Any]:
    """Every measure of the best of n: the mean over prompts with its interval."""
    figures: dict[str, Any] = {
        name: asdict(estimators.bootstrap_mean([best_of(pool, n, value) for pool in pools]))
        for name, value in MEASURES.items()
    }
    figures["perplexity_under_base"] = {name: math.exp(nats) for name, nats in figures["base_nats_a_token"].items()}
    return figures


def best_of_n(base: Pools, sizes: Sequence[int] = N) -> dict[str, Any]:
    """n -> every measure of best-of-n of the base policy, with the upper bound of its KL (arXiv 2401.01879)."""
    return {str(n): measured(base, n) | {"kl": {"mean": estimators.kl_upper_bound(n)}} for n in sizes}


def distinct(pools: Pools) -> float:
    """Diversity: the share of distinct first four words among a prompt's samples, averaged over prompts."""
    return fmean(
        len({tuple(sample.text.split()[:4]) for sample in pool[:SAMPLES]}) / len(pool[:SAMPLES]) for pool in pools
    )
