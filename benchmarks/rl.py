"""PPO and REINFORCE with a reward model, against best-of-n of the policy that training started from.

SmolLM2 continues openings of film reviews and `movie-sentiment` rewards the continuations, as in `benchmarks.improve`.
Each method trains with several seeds on training openings; the trained policy then samples four continuations of every
held-out opening, at best_of=1. It is compared with best-of-n of the untrained policy, from a pool of 32 samples for
each opening. Measures and intervals are those of `benchmarks.policy_evaluation`. The seconds of a run are those of its
steps, without the start of the engine.

A finished run is added to benchmarks/results/rl.json at once, so the runs can be spread over several calls:

    python -m benchmarks.rl [--out runs/rl] [--methods ppo reinforce] [--seeds 0 1 2]
"""

import argparse
import csv
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
from benchmarks.provenance import RESULTS, provenance
from benchmarks.stats import write_result

RECIPES = {
    "ppo": ("--steps", "24", "--batch-size", "32", "--epochs", "2", "--minibatches", "2", "--learning-rate", "3e-4"),
    "reinforce": ("--steps", "18", "--batch-size", "32", "--learning-rate", "1e-3"),
}
COMMON = ("--max-tokens", str(MAX_TOKENS), "--samples-per-prompt", "4", "--kl-coef", "0.1", "--holdout", "0")
SECONDS = ("rollout_s", "learning_s", "sync_s")
KEPT = ("step", "reward", "kl", "entropy", "length", "mismatch", "sync_difference", *SECONDS, "peak_memory_mib")
"""Columns of a run's metrics.csv that the result keeps."""
POOL_SEED, EVALUATION_SEED = "7", "0"


def train(out: Path, method: str, seed: int) -> Path:
    """Trains a policy, merges its adapter and samples from it; an interrupted run continues. Returns its directory."""
    run = out / f"{method}-{seed}"
    if not (run / "model").is_dir():
        nbest(
            *("train", method, "--prompts", str(out / "train.jsonl"), "--out", str(run), "--model", MODEL),
            *(*COMMON, *RECIPES[method], "--seed", str(seed), "--merge", "--resume"),
        )
    sample(out / "held-out.jsonl", run / "samples", str(run / "model"), SAMPLES, EVALUATION_SEED)
    return run


def steps_of(run: Path) -> list[dict[str, float]]:
    with (run / "metrics.csv").open() as file:
        return [{name: float(row[name]) for name in KEPT} for row in csv.DictReader(file)]


def measure(out: Path, method: str, seed: int) -> dict[str, Any]:
    run = train(out, method, seed)
    pools = read(out, run.name, str(run / "model"), run / "samples")
    steps = steps_of(run)
    return {
        "provenance": provenance(flags={"nbest train": " ".join((method, *COMMON, *RECIPES[method]))}),
        "seconds": {name: sum(row[name] for row in steps) for name in SECONDS},
        "held_out": measured(pools, 1),
        "distinct_first_words": distinct(pools),
        "steps": steps,
        "samples": [asdict(pool[0]) for pool in pools],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/rl"), help="directory of samples and models")
    parser.add_argument("--methods", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    arguments = parser.parse_args()
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    write_openings(out / "train.jsonl", training_openings.OPENINGS)
    held_out = write_openings(out / "held-out.jsonl", film_reviews.OPENINGS)
    sample(held_out, out / "pool", MODEL, max(N), POOL_SEED)
    base = read(out, "base", MODEL, out / "pool")
    path = RESULTS / "rl.json"
    runs = json.loads(path.read_text())["runs"] if path.exists() else {}
    for seed in arguments.seeds:
        for method in arguments.methods:
            runs.setdefault(method, {})[str(seed)] = measure(out, method, seed)
            result = {
                "provenance": provenance(flags={}),
                "policy": MODEL,
                "reward_model": "movie-sentiment",
                "prompts": {"train": len(training_openings.OPENINGS), "held_out": len(base)},
                "max_tokens": MAX_TOKENS,
                "best_of_n_of_the_base": best_of_n(base),
                "distinct_first_words_of_the_base": distinct(base),
                "runs": runs,
            }
            write_result("rl", result)


if __name__ == "__main__":
    main()
