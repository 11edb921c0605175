"""Best-of-n at the time of the request against best-of-n taught to the policy.

SmolLM2 continues openings of film reviews and `movie-sentiment` rewards what it writes. On held-out openings, at
best_of=1, these are measured:

    base            the policy as it comes, and from one pool of 32 samples a prompt its best of n for n = 1 ... 32
    round 1, 2      after rounds of rejection sampling, `nbest improve`: best of 8 on other openings, fine-tuned on
    dpo             after DPO on the best against the worst of the first round's samples

Each by its mean reward, the VADER lexicon (-1 to 1), which nothing was trained on, the perplexity of what it writes
under the base policy, and KL(policy || base) in nats a sequence: the mean of log pi - log pi_base over the samples. For
best of n the KL is the bound log n - (n - 1)/n. Intervals are bootstrap intervals over prompts.

What is drawn and trained is kept in --out, and a run that was interrupted goes on there.

    python -m benchmarks.improve [--out runs/improve]
"""

import argparse
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

from benchmarks import film_reviews, training_openings
from benchmarks.birth import birth_certificate
from benchmarks.sequence_likelihood import log_probs
from benchmarks.stats import hand_in
from reranker import estimators
from reranker.prepared import resolve

MODEL = "smollm2-135m-instruct"
N = (1, 2, 4, 8, 16, 32)
ROUNDS = 2
SAMPLES = 4
"""Of a held-out opening, from each policy that was trained."""
MAX_TOKENS = "32"
RECIPE = ("--epochs", "4", "--batch-size", "8", "--seed", "0")
SAMPLING = ("--best-of", "8", "--max-tokens", MAX_TOKENS, "--evaluation-samples", str(SAMPLES))
IMPROVE = (*SAMPLING, "--learning-rate", "5e-4", *RECIPE)
DPO = ("--learning-rate", "2e-4", "--beta", "0.1", "--holdout", "0", *RECIPE)
POOL_SEED, EVALUATION_SEED = "7", "0"


@dataclass(frozen=True, slots=True)
class Sample:
    """A continuation of an opening. `base_nats` and `nats` are its log-probabilities under base and policy."""

    prompt: str
    text: str
    reward: float
    vader: float
    tokens: int
    base_nats: float
    nats: float


Pools = list[list[Sample]]
"""The samples of each prompt."""


def nbest(*arguments: str) -> None:
    subprocess.run([Path(sys.executable).with_name("nbest"), *arguments], check=True)


def write_openings(path: Path, openings: Sequence[str]) -> Path:
    path.write_text("".join(json.dumps({"prompt": one}) + "\n" for one in openings))
    return path


def sample(held_out: Path, out: Path, model: str, best_of: int, seed: str) -> None:
    """`nbest batch` with the reward model that nbest comes with; it goes on where it was interrupted."""
    if not (out / "summary.json").exists():
        options = ("--best-of", str(best_of), "--max-tokens", MAX_TOKENS, "--temperature", "1.0", "--seed", seed)
        nbest("batch", str(held_out), "--out", str(out), "--model", model, *options)


def train(out: Path) -> dict[str, tuple[str, Path]]:
    """All that is drawn and trained; (policy, its samples on the held-out openings) by name."""
    train_openings = write_openings(out / "train.jsonl", training_openings.OPENINGS)
    held_out = write_openings(out / "held-out.jsonl", film_reviews.OPENINGS)
    sample(held_out, out / "pool", MODEL, max(N), POOL_SEED)
    rounds = ("--rounds", str(ROUNDS), "--model", MODEL, *IMPROVE)
    rejection = out / "rejection"
    nbest("improve", "--prompts", str(train_openings), "--held-out", str(held_out), "--out", str(rejection), *rounds)
    pairs, dpo = out / "pairs.jsonl", out / "dpo"
    if not pairs.exists():
        nbest("export", str(rejection / "round-1" / "samples"), "--format", "preference", "--out", str(pairs))
    if not (dpo / "model").is_dir():
        nbest("train", "dpo", "--data", str(pairs), "--out", str(dpo), "--model", MODEL, "--merge", "--resume", *DPO)
    sample(held_out, dpo / "evaluation", str(dpo / "model"), SAMPLES, EVALUATION_SEED)
    policies = {
        f"round {number}": (str(rejection / f"round-{number}" / "sft" / "model"), rejection / f"round-{number}")
        for number in range(1, ROUNDS + 1)
    }
    evaluated = {name: (model, place / "evaluation") for name, (model, place) in policies.items()}
    return {"base": (MODEL, out / "pool"), **evaluated, "dpo": (str(dpo / "model"), dpo / "evaluation")}


def read(out: Path, name: str, model: str, directory: Path) -> Pools:
    """The samples of that policy, judged; kept in OUT/judged, since the likelihoods take a while."""
    kept = out / "judged" / f"{name}.json"
    if not kept.exists():
        results = [json.loads(line) for line in (directory / "results.jsonl").read_text().splitlines()]
        results.sort(key=lambda one: one["line"])
        drawn = [(one["prompt"], candidate) for one in results for candidate in one["candidates"]]
        texts = [(prompt, candidate["text"], candidate["finish_reason"] == "stop") for prompt, candidate in drawn]
        of_base = log_probs(resolve(MODEL), texts)
        of_policy = of_base if model == MODEL else log_probs(model, texts)
        judge = SentimentIntensityAnalyzer()
        samples = [
            Sample(
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
    pools: dict[str, list[Sample]] = {}
    for fields in json.loads(kept.read_text()):
        pools.setdefault(fields["prompt"], []).append(Sample(**fields))
    return list(pools.values())


def best_of(pool: Sequence[Sample], n: int, value: Callable[[Sample], float]) -> float:
    return estimators.expected_value_of_best([one.reward for one in pool], [value(one) for one in pool], n)


def surprise(one: Sample) -> float:
    """Nats a token under the base policy; an empty text surprises nobody."""
    return -one.base_nats / one.tokens if one.tokens else 0.0


MEASURES: dict[str, Callable[[Sample], float]] = {
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


def evaluate(out: Path, policies: dict[str, tuple[str, Path]]) -> dict[str, Any]:
    pools = {name: read(out, name, model, place) for name, (model, place) in policies.items()}
    base = pools.pop("base")
    rejection = json.loads((out / "rejection" / "summary.json").read_text())
    return {
        "birth": birth_certificate(flags={"nbest improve": " ".join(IMPROVE), "nbest train dpo": " ".join(DPO)}),
        "policy": MODEL,
        "reward_model": "movie-sentiment",
        "prompts": {"train": len(training_openings.OPENINGS), "held_out": len(base)},
        "max_tokens": int(MAX_TOKENS),
        "demonstrations": [row["demonstrations"] for row in rejection if row["round"]],
        "pairs": len((out / "pairs.jsonl").read_text().splitlines()),
        "samples_a_prompt": {"base": max(N), **{name: len(pool[0]) for name, pool in pools.items()}},
        "best_of_n_of_the_base": {
            str(n): measured(base, n) | {"kl": {"mean": estimators.kl_upper_bound(n)}} for n in N
        },
        "policies_at_best_of_1": {name: measured(pool, 1) for name, pool in pools.items()},
        "distinct_first_words": {name: distinct(pool) for name, pool in {"base": base, **pools}.items()},
        "samples": {name: [asdict(pool[0]) for pool in of] for name, of in {"base": base, **pools}.items()},
    }


def distinct(pools: Pools) -> float:
    """Share of distinct ones among the first four words of the samples of a prompt: how much variety is left."""
    return fmean(len({tuple(one.text.split()[:4]) for one in pool[:SAMPLES]}) / len(pool[:SAMPLES]) for pool in pools)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/improve"), help="where samples and models are kept")
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    hand_in("improve", evaluate(out, train(out)))


if __name__ == "__main__":
    main()
