"""Best-of-n at inference against policies trained on best-of-n samples.

SmolLM2 continues openings of film reviews and `movie-sentiment` rewards the continuations. Measured on held-out
openings, at best_of=1:

    base            the untrained policy, and its best of n for n = 1 ... 32, from a pool of 32 samples for each prompt
    round 1, 2      after one and two rounds of rejection sampling (`nbest improve`): fine-tuned on the best of 8
                    samples for other openings
    dpo             after DPO on the best against the worst of the first round's samples

Measures are the mean reward, the VADER lexicon (-1 to 1), which no policy was trained on, the perplexity of the samples
under the base policy, and KL(policy || base) in nats a sequence: the mean of log pi - log pi_base over the samples. For
best of n the KL is the bound log n - (n - 1)/n. Intervals are bootstrap intervals over prompts.

Samples and trained models are kept in --out; an interrupted run continues from there.

    python -m benchmarks.improve [--out runs/improve]
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import film_reviews, training_openings
from benchmarks.policy_evaluation import (
    MAX_TOKENS,
    MODEL,
    SAMPLES,
    N,
    best_of_n,
    distinct,
    measured,
    nbest,
    read,
    sample,
    write_openings,
)
from benchmarks.provenance import provenance
from benchmarks.stats import write_result

ROUNDS = 2
RECIPE = ("--epochs", "4", "--batch-size", "8", "--seed", "0")
SAMPLING = ("--best-of", "8", "--max-tokens", str(MAX_TOKENS), "--evaluation-samples", str(SAMPLES))
IMPROVE = (*SAMPLING, "--learning-rate", "5e-4", *RECIPE)
DPO = ("--learning-rate", "2e-4", "--beta", "0.1", "--holdout", "0", *RECIPE)
POOL_SEED, EVALUATION_SEED = "7", "0"


def train(out: Path) -> dict[str, tuple[str, Path]]:
    """Samples and trains all policies; returns name -> (policy, directory of its samples on the held-out openings)."""
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
    evaluated = {name: (model, directory / "evaluation") for name, (model, directory) in policies.items()}
    return {"base": (MODEL, out / "pool"), **evaluated, "dpo": (str(dpo / "model"), dpo / "evaluation")}


def evaluate(out: Path, policies: dict[str, tuple[str, Path]]) -> dict[str, Any]:
    pools = {name: read(out, name, model, directory) for name, (model, directory) in policies.items()}
    base = pools.pop("base")
    rejection = json.loads((out / "rejection" / "summary.json").read_text())
    return {
        "provenance": provenance(flags={"nbest improve": " ".join(IMPROVE), "nbest train dpo": " ".join(DPO)}),
        "policy": MODEL,
        "reward_model": "movie-sentiment",
        "prompts": {"train": len(training_openings.OPENINGS), "held_out": len(base)},
        "max_tokens": MAX_TOKENS,
        "demonstrations": [row["demonstrations"] for row in rejection if row["round"]],
        "pairs": len((out / "pairs.jsonl").read_text().splitlines()),
        "samples_a_prompt": {"base": max(N), **{name: len(pool[0]) for name, pool in pools.items()}},
        "best_of_n_of_the_base": best_of_n(base),
        "policies_at_best_of_1": {name: measured(pool, 1) for name, pool in pools.items()},
        "distinct_first_words": {name: distinct(pool) for name, pool in {"base": base, **pools}.items()},
        "samples": {name: [asdict(pool[0]) for pool in of_name] for name, of_name in {"base": base, **pools}.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/improve"), help="directory of samples and models")
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    write_result("improve", evaluate(out, train(out)))


if __name__ == "__main__":
    main()
