"""Trains and evaluates the `movie-sentiment` reward model: `python -m benchmarks.movie_sentiment`.

It downloads the ratings, splits them, trains with the recipe below, installs the adapter in reranker/pretrained/ and
writes the evaluation to benchmarks/results/. Evaluated are the test split of the film reviews and the other domains of
the source, with two baselines on the same comparisons:

    VADER          the hand-made lexicon and rules of the paper that published the ratings
    linear head    see `benchmarks.linear_head`
"""

import itertools
import json
import shutil
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from benchmarks.linear_head import ScoreRows, train_linear_head
from benchmarks.movie_ratings import REQUIREMENT, SDIST_SHA256, sampled, unseen, write_other_domains, write_splits
from benchmarks.provenance import provenance
from reranker.models.bundled import PRETRAINED_REWARDS
from reranker.models.reward_model import RewardModel
from training.data.preferences import PreferenceRow, read_rows
from training.reward.config import RewardTraining
from training.reward.evaluate import RewardEvaluation, accuracies, score_rows
from training.reward.train import train_reward

NAME = "movie-sentiment"
RECIPE = RewardTraining(
    style="document", num_layers=18, lora_layers=6, lora_rank=8, epochs=2.0, batch_size=32, learning_rate=5e-4, seed=0
)
"""18 of 30 layers: linear probes predict ratings best near that depth (benchmarks/layer_probe.py), and fewer layers
make scoring cheaper."""

PACKAGES = ("torch", "transformers", "peft", "vaderSentiment")

RESULTS = Path("benchmarks/results/reward_movie-sentiment.json")


def main(
    out: Annotated[Path, typer.Option(help="Directory of the run: data, adapter, metrics.")] = Path("build") / NAME,
    results: Annotated[Path, typer.Option(help="Output file of the evaluation.")] = RESULTS,
    domain_snippets: Annotated[
        int, typer.Option(min=2, help="Number of snippets of each other domain to evaluate on, sampled by hash.")
    ] = 1000,
    evaluate_only: Annotated[bool, typer.Option(help="Evaluate the installed adapter without training.")] = False,
) -> None:
    """Train the movie-sentiment reward model and evaluate it."""
    splits = write_splits(out / "data")
    if not evaluate_only:
        started = time.monotonic()
        train_reward(splits["train"], out, RECIPE, validation_data=splits["validation"])
        install(out / "adapter", {"wall_s": round(time.monotonic() - started), "threads": torch.get_num_threads()})
    evaluation = evaluate(splits, write_other_domains(out / "data"), domain_snippets)
    results.write_text(json.dumps(evaluation, indent=2) + "\n")
    typer.echo(json.dumps(evaluation["test"]))


def install(adapter: Path, run: dict[str, Any]) -> None:
    """Replaces the adapter that is shipped with nbest; its model card is kept."""
    target = PRETRAINED_REWARDS[NAME]
    target.mkdir(parents=True, exist_ok=True)
    for file in adapter.iterdir():
        shutil.copyfile(file, target / file.name)
    (target / "training.json").write_text(
        json.dumps({"recipe": asdict(RECIPE), "run": run, "provenance": provenance(packages=PACKAGES)}, indent=2) + "\n"
    )


def evaluate(splits: dict[str, Path], other_domains: dict[str, Path], domain_snippets: int) -> dict[str, Any]:
    """Pair accuracies of the installed adapter and the baselines, with data, recipe and provenance."""
    train = read_rows(splits["train"])
    scorers: dict[str, ScoreRows] = {
        NAME: partial(score_rows, RewardModel.load(NAME, device="cpu", dtype="float32")),
        "linear head on the frozen trunk": train_linear_head(train, splits["train"], RECIPE),
        "VADER lexicon": vader,
    }

    def measure(rows: list[PreferenceRow], source: Path) -> dict[str, Any]:
        rewards = {name: score(rows, source) for name, score in scorers.items()}
        return {
            name: _percent(accuracies(rewards_N, rows, min_gap=RECIPE.min_gap)) for name, rewards_N in rewards.items()
        }

    def measure_domain(source: Path) -> dict[str, Any]:
        rows = read_rows(source)
        new = list(itertools.compress(rows, unseen(map(_text, rows), map(_text, train))))
        chosen = list(itertools.compress(new, sampled(list(map(_text, new)), domain_snippets)))
        counts = {"snippets": len(chosen), "drawn_from": len(new), "left_out_as_trained_on": len(rows) - len(new)}
        return counts | {"scorers": measure(chosen, source)}

    return {
        "data": {"source": REQUIREMENT, "sha256": SDIST_SHA256}
        | {f"{split}_snippets": len(read_rows(path)) for split, path in splits.items()},
        "measure": "share of comparisons (mean ratings 1 or more apart; by_gap: as far apart as it says) in the right "
        "order, ties half; 95% interval by bootstrap over snippets",
        "test": measure(read_rows(splits["test"]), splits["test"]),
        "other_domains": {name: measure_domain(path) for name, path in other_domains.items()},
        "adapter": json.loads((PRETRAINED_REWARDS[NAME] / "training.json").read_text()),
        "provenance": provenance(packages=PACKAGES),
    }


def vader(rows: list[PreferenceRow], _: Path) -> list[tuple[float, ...]]:
    """The lexicon's compound score of each row's text."""
    analyzer = SentimentIntensityAnalyzer()
    return [(float(analyzer.polarity_scores(_text(row))["compound"]),) for row in rows]


def _text(row: PreferenceRow) -> str:
    return row.texts[0]


def _percent(evaluation: RewardEvaluation) -> dict[str, Any]:
    def in_percent(accuracy: Any) -> dict[str, Any]:
        percents = {name: round(100 * getattr(accuracy, name), 2) for name in ("accuracy", "low", "high")}
        return percents | {"comparisons": accuracy.comparisons}

    by_gap = {name: in_percent(accuracy) for name, accuracy in evaluation.by_gap.items()}
    return in_percent(evaluation.overall) | {"by_gap": by_gap}


if __name__ == "__main__":
    typer.run(main)
