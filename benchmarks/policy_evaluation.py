"""What a policy writes on openings of film reviews, judged by more than the reward it was trained on.

A sample has its reward, the VADER lexicon's mark (-1 to 1), which nothing was trained on, and its log-probabilities
under the policy that wrote it and under the base: KL(policy || base), in nats a sequence, is the mean of their
difference, and perplexity under the base says how natural the text is to a model that nobody tuned.
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
"""Of an opening, from each policy that was trained."""


@dataclass(frozen=True, slots=True)
class JudgedSample:
    """A continuation of an opening. `base_nats` and `nats` are its log-probabilities under base and policy."""

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
    subprocess.run([Path(sys.executable).with_name("nbest"), *arguments], check=True)


def write_openings(path: Path, openings: Sequence[str]) -> Path:
    path.write_text("".join(json.dumps({"prompt": one}) + "\n" for one in openings))
    return path


def sample(held_out: Path, out: Path, model: str, best_of: int, seed: str) -> None:
    """`nbest batch` with the reward model that nbest comes with; it goes on where it was interrupted."""
    if not (out / "summary.json").exists():
        options = ("--best-of", str(best_of), "--max-tokens", str(MAX_TOKENS), "--temperature", "1.0", "--seed", seed)
        nbest("batch", str(held_out), "--out", str(out), "--model", model, *options)


def read(out: Path, name: str, model: str, directory: Path, base: str = MODEL) -> Pools:
    """The samples of that policy, judged beside `base`; kept in OUT/judged, since the likelihoods take a while."""
    kept = out / "judged" / f"{name}.json"
    if not kept.exists():
        results = [json.loads(line) for line in (directory / "results.jsonl").read_text().splitlines()]
        results.sort(key=lambda one: one["line"])
        drawn = [(one["prompt"], candidate) for one in results for candidate in one["candidates"]]
        texts = [(prompt, candidate["text"], candidate["finish_reason"] == "stop") for prompt, candidate in drawn]
        of_base = log_probs(resolve(base), texts)
        of_policy = of_base if model == base else log_probs(model, texts)
        judge = SentimentIntensityAnalyzer()
        samples = [
            JudgedSample(
                prompt=prompt,
                text=candidate["text"],
                reward=candidate["reward"],
                vader=judge.polarity_scores(prompt + candidate["text"])["compound"],
                tokens=tokens,
                base_nats=round(base_nats, 4),
                nats=round(nats, 4),
            )
            for (prompt, candidate), (base_nats, tokens), (nats, _) in zip(drawn, of_base, of_policy, strict=True)
        ]
        kept.parent.mkdir(exist_ok=True)
        kept.write_text(json.dumps([asdict(one) for one in samples]))
    pools: dict[str, list[JudgedSample]] = {}
    for fields in json.loads(kept.read_text()):
        pools.setdefault(fields["prompt"], []).append(JudgedSample(**fields))
    return list(pools.values())


def best_of(pool: Sequence[JudgedSample], n: int, value: Callable[[JudgedSample], float]) -> float:
    return estimators.expected_value_of_best([one.reward for one in pool], [value(one) for one in pool], n)


def surprise(one: JudgedSample) -> float:
    """Nats a token under the base policy; an empty text surprises nobody."""
    return -one.base_nats / one.tokens if one.tokens else 0.0


MEASURES: dict[str, Callable[[JudgedSample], float]] = {
    "reward": lambda one: one.reward,
    "vader": lambda one: one.vader,
    "base_nats_a_token": surprise,
    "kl": lambda one: one.nats - one.base_nats,
}


def measured(pools: Pools, n: int) -> dict[str, Any]:
    """Every measure of the best of n, a mean over prompts with its interval."""
    found: dict[str, Any] = {
        name: asdict(estimators.bootstrap_mean([best_of(pool, n, value) for pool in pools]))
        for name, value in MEASURES.items()
    }
    found["perplexity_under_base"] = {name: math.exp(nats) for name, nats in found["base_nats_a_token"].items()}
    return found


def best_of_n(base: Pools, of: Sequence[int] = N) -> dict[str, Any]:
    """What choosing alone would do, against its bound on the KL (arXiv 2401.01879)."""
    return {str(n): measured(base, n) | {"kl": {"mean": estimators.kl_upper_bound(n)}} for n in of}


def distinct(pools: Pools) -> float:
    """Share of distinct ones among the first four words of the samples of a prompt: how much variety is left."""
    return fmean(len({tuple(one.text.split()[:4]) for one in pool[:SAMPLES]}) / len(pool[:SAMPLES]) for pool in pools)
