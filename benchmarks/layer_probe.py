"""Which layer tells a reward best: `python -m benchmarks.layer_probe`.

For every layer of the frozen trunk, ridge regression from the last token's state to the rating, fitted on part of the
training split and measured on the validation split of the film-review ratings. The test split is not looked at, so
that choosing a depth by this table leaves the final figures honest.
"""

import json
import random
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import AutoModel

from benchmarks.movie_ratings import write_splits
from benchmarks.movie_sentiment import RECIPE
from benchmarks.provenance import provenance
from reranker.models.bundled import resolve
from reranker.models.device import computes_bfloat16
from reranker.models.rendering import Rendered, pad, scored_index
from reranker.models.reward_model import make_renderer
from training.data.preferences import read_rows, render_rows
from training.reward.evaluate import score_all
from training.reward.pair_accuracy import pair_accuracy

RIDGE = 1000.0
"""Penalty on standardised features."""


def main(
    out: Annotated[Path, typer.Option(help="Directory for the data.")] = Path("build/movie-sentiment"),
    results: Annotated[Path, typer.Option(help="Where the table goes.")] = Path(
        "benchmarks/results/reward_layer_probe.json"
    ),
    train_texts: Annotated[int, typer.Option(help="Texts to fit on.")] = 3000,
) -> None:
    """Pair accuracy of a linear probe at every layer."""
    splits = write_splits(out / "data")
    validation = read_rows(splits["validation"])
    # Drawn at random: the file holds the favourable reviews first.
    train = random.Random(RECIPE.seed).sample(read_rows(splits["train"]), train_texts)
    base = resolve(RECIPE.base_model)
    trunk = AutoModel.from_pretrained(base, dtype=torch.float32).eval()
    renderer = make_renderer(base, trunk, RECIPE.style)
    rendered = [e.rendered[0] for e in render_rows(train, renderer, splits["train"])]
    rendered += [e.rendered[0] for e in render_rows(validation, renderer, splits["validation"])]
    states_L_N_D = last_states(trunk, rendered)
    ratings_N = torch.tensor([row.ratings[0] for row in train])
    table = {}
    for layer, states_N_D in enumerate(states_L_N_D[1:], start=1):  # 0 is the embedding: EOS, always the same
        rewards_N = probe(states_N_D[: len(train)], ratings_N, states_N_D[len(train) :])
        measured = pair_accuracy([(reward,) for reward in rewards_N.tolist()], validation, min_gap=RECIPE.min_gap)
        table[layer] = round(100 * measured.accuracy, 2)
    found = {
        "validation_pair_accuracy_by_layer": table,
        "train_texts": len(train),
        "ridge": RIDGE,
        "provenance": provenance(),
    }
    results.write_text(json.dumps(found, indent=2) + "\n")
    typer.echo(json.dumps(found))


def probe(train_N_D: torch.Tensor, ratings_N: torch.Tensor, test_M_D: torch.Tensor) -> torch.Tensor:
    """rewards_M of a ridge regression on standardised features."""
    center_D, scale_D = train_N_D.mean(0), train_N_D.std(0) + 1e-6
    features_N_D = ((train_N_D - center_D) / scale_D).double()
    covariance_D_D = features_N_D.T @ features_N_D + RIDGE * torch.eye(features_N_D.shape[1]).double()
    weights_D = torch.linalg.solve(covariance_D_D, features_N_D.T @ (ratings_N - ratings_N.mean()).double())
    rewards_M: torch.Tensor = ((test_M_D - center_D) / scale_D).double() @ weights_D
    return rewards_M


@torch.inference_mode()
def last_states(trunk: Any, rendered_N: list[Rendered]) -> torch.Tensor:
    """states_L_N_D: the last token's hidden state after every layer, the embedding first."""
    states: list[torch.Tensor] = []

    def read(batch: list[Rendered]) -> list[float]:
        input_ids_N_T, mask_N_T = pad(batch, pad_id=0)
        with torch.autocast("cpu", torch.bfloat16, enabled=computes_bfloat16("cpu")):
            output = trunk(input_ids=input_ids_N_T, attention_mask=mask_N_T, use_cache=False, output_hidden_states=True)
        rows_N, last_N = torch.arange(len(batch)), scored_index(mask_N_T)
        places = range(len(states), len(states) + len(batch))
        states_N_L_D = torch.stack([states_N_T_D[rows_N, last_N] for states_N_T_D in output.hidden_states], dim=1)
        states.extend(states_N_L_D.float())
        return [float(place) for place in places]

    order_N = [int(place) for place in score_all(read, rendered_N)]
    return torch.stack(states)[order_N].transpose(0, 1).clone()


if __name__ == "__main__":
    typer.run(main)
