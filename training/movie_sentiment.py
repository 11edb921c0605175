"""Makes the `movie-sentiment` reward model and measures it: `python -m training.movie_sentiment`.

Fetches the ratings, splits them, trains by the recipe below, installs the adapter in reranker/pretrained/ and writes
the evaluation on the test split to benchmarks/results/, with two baselines on the same comparisons:

    VADER          the hand-made lexicon and rules of the paper the ratings come from
    linear head    Bradley-Terry on the frozen trunk's last states, averaged over the text: what the trunk knows untuned
"""

import json
import platform
import shutil
import subprocess
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import AutoModel
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from reranker.prepared import PRETRAINED_REWARDS, resolve
from reranker.rendering import Rendered, pad
from reranker.reward_model import RewardModel, make_renderer
from training.evaluate_reward import RewardEvaluation, accuracies, score_all, score_rows
from training.movie_ratings import REQUIREMENT, SDIST_SHA256, write_splits
from training.preference_data import Row, ordered_pairs, read_rows, render_rows
from training.reward import RewardTraining, bradley_terry_loss, computes_bfloat16, train_reward

NAME = "movie-sentiment"
RECIPE = RewardTraining(
    style="document", num_layers=18, lora_layers=6, lora_rank=8, epochs=2.0, batch_size=32, learning_rate=5e-4, seed=0
)
"""18 of 30 layers: linear probes tell ratings best near there, and scoring costs less; see training/layer_probe.py."""

RESULTS = Path("benchmarks/results/reward_movie-sentiment.json")


def main(
    out: Annotated[Path, typer.Option(help="Directory of the run: data, adapter, metrics.")] = Path("build") / NAME,
    results: Annotated[Path, typer.Option(help="Where the evaluation goes.")] = RESULTS,
    evaluate_only: Annotated[bool, typer.Option(help="Measure the installed adapter, train nothing.")] = False,
) -> None:
    """Make the movie-sentiment reward model and measure it."""
    splits = write_splits(out / "data")
    if not evaluate_only:
        started = time.monotonic()
        train_reward(splits["train"], out, RECIPE, validation_data=splits["validation"])
        install(out / "adapter", {"wall_s": round(time.monotonic() - started), "threads": torch.get_num_threads()})
    evaluation = evaluate(splits)
    results.write_text(json.dumps(evaluation, indent=2) + "\n")
    typer.echo(json.dumps(evaluation["test"]))


def install(adapter: Path, run: dict[str, Any]) -> None:
    """Replaces the adapter nbest comes with; its model card stays."""
    target = PRETRAINED_REWARDS[NAME]
    target.mkdir(parents=True, exist_ok=True)
    for file in adapter.iterdir():
        shutil.copyfile(file, target / file.name)
    (target / "training.json").write_text(json.dumps({"recipe": asdict(RECIPE), "run": run} | birth(), indent=2) + "\n")


def evaluate(splits: dict[str, Path]) -> dict[str, Any]:
    """The installed adapter and the baselines on the test split, with all that is needed to tell where it came from."""
    rows = read_rows(splits["test"])
    model = RewardModel.load(NAME, device="cpu")
    vader = SentimentIntensityAnalyzer()
    scorers: dict[str, list[tuple[float, ...]]] = {
        NAME: score_rows(model, rows, splits["test"]),
        "linear head on the frozen trunk": linear_head(read_rows(splits["train"]), rows, splits),
        "VADER lexicon": [(float(vader.polarity_scores(row.texts[0])["compound"]),) for row in rows],
    }
    evaluations = {name: accuracies(rewards, rows, min_gap=RECIPE.min_gap) for name, rewards in scorers.items()}
    return {
        "data": {"source": REQUIREMENT, "sha256": SDIST_SHA256}
        | {f"{split}_snippets": len(read_rows(path)) for split, path in splits.items()},
        "measure": "share of test comparisons (mean ratings 1 or more apart) in the right order, ties half; "
        "95% interval by bootstrap over snippets",
        "test": {name: _percent(evaluation) for name, evaluation in evaluations.items()},
        "adapter": json.loads((PRETRAINED_REWARDS[NAME] / "training.json").read_text()),
        "evaluated": birth(),
    }


def linear_head(
    train: list[Row], test: list[Row], splits: dict[str, Path], *, steps: int = 600, texts_per_step: int = 512
) -> list[tuple[float, ...]]:
    """Rewards of the test rows by a linear head, trained by the same loss on the frozen, mean-pooled trunk."""
    base = resolve(RECIPE.base_model)
    trunk = AutoModel.from_pretrained(base, dtype=torch.float32).eval()
    renderer = make_renderer(base, trunk, RECIPE.style)
    train_N_D, test_N_D = (
        _mean_states(trunk, [e.rendered[0] for e in render_rows(rows, renderer, splits[name])])
        for rows, name in ((train, "train"), (test, "test"))
    )
    center_D, scale_D = train_N_D.mean(0), train_N_D.std(0)
    train_N_D, test_N_D = (train_N_D - center_D) / scale_D, (test_N_D - center_D) / scale_D
    ratings_N = torch.tensor([row.ratings[0] for row in train])
    generator = torch.Generator().manual_seed(RECIPE.seed)
    weights_D = torch.zeros(train_N_D.shape[1], requires_grad=True)
    optimizer = torch.optim.AdamW([weights_D], lr=3e-3, weight_decay=0.1)
    for _ in range(steps):
        chosen = torch.randperm(len(ratings_N), generator=generator)[:texts_per_step]
        better_K, worse_K = ordered_pairs(ratings_N[chosen], torch.zeros(len(chosen)), RECIPE.min_gap)
        optimizer.zero_grad()
        torch.autograd.backward([bradley_terry_loss(train_N_D[chosen] @ weights_D, better_K, worse_K)])
        optimizer.step()
    return [(reward,) for reward in (test_N_D @ weights_D).tolist()]


@torch.inference_mode()
def _mean_states(trunk: Any, rendered_N: list[Rendered]) -> torch.Tensor:
    """states_N_D: last hidden states averaged over each text."""
    states: list[torch.Tensor] = []

    def pool(batch: list[Rendered]) -> list[float]:
        input_ids_N_T, mask_N_T = pad(batch, pad_id=0)
        with torch.autocast("cpu", torch.bfloat16, enabled=computes_bfloat16("cpu")):
            states_N_T_D = trunk(input_ids=input_ids_N_T, attention_mask=mask_N_T, use_cache=False).last_hidden_state
        weights_N_T_1 = mask_N_T[:, :, None] / mask_N_T.sum(1)[:, None, None]
        places = range(len(states), len(states) + len(batch))
        states.extend((states_N_T_D * weights_N_T_1).sum(1))
        return [float(place) for place in places]

    order_N = [int(place) for place in score_all(pool, rendered_N)]
    return torch.stack(states)[order_N].clone()


def birth() -> dict[str, Any]:
    """When, from which commit, on what and with which versions."""
    git = shutil.which("git") or "git"
    commit = subprocess.run([git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)  # noqa: S603 fixed
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit.stdout.strip(),
        "machine": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads",
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "vaderSentiment")},
    }


def _percent(evaluation: RewardEvaluation) -> dict[str, Any]:
    def one(accuracy: Any) -> dict[str, Any]:
        percents = {name: round(100 * getattr(accuracy, name), 2) for name in ("accuracy", "low", "high")}
        return percents | {"comparisons": accuracy.comparisons}

    return one(evaluation.overall) | {"by_gap": {name: one(accuracy) for name, accuracy in evaluation.by_gap.items()}}


if __name__ == "__main__":
    typer.run(main)
