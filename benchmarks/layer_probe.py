"""Pair accuracy of a linear probe at every layer of the trunk: `python -m benchmarks.layer_probe`.

For every layer of the frozen trunk a ridge regression maps the last token's hidden state to the rating. It is fitted on
part of the training split and measured on the validation split of the film-review ratings. The test split is not used,
so a depth chosen by this table does not bias the final figures.
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
    results: Annotated[Path, typer.Option(help="Output file.")] = Path("benchmarks/results/reward_layer_probe.json"),
    train_texts: Annotated[int, typer.Option(help="Number of texts to fit on.")] = 3000,
) -> None:
    """Measure the pair accuracy of a linear probe at every layer."""
    splits = write_splits(out / "data")
    validation = read_rows(splits["validation"])
    # A random sample, since the file lists the favourable reviews first.
    train = random.Random(RECIPE.seed).sample(read_rows(splits["train"]), train_texts)
    base = resolve(RECIPE.base_model)
    trunk = AutoModel.from_pretrained(base, dtype=torch.float32).eval()
    renderer = make_renderer(base, trunk, RECIPE.style)
    rendered = [row.rendered[0] for row in render_rows(train, renderer, splits["train"])]
    rendered += [row.rendered[0] for row in render_rows(validation, renderer, splits["validation"])]
    states_L_N_D = last_states(trunk, rendered)
    ratings_N = torch.tensor([row.ratings[0] for row in train])
    table = {}
    for layer, states_N_D in enumerate(states_L_N_D[1:], start=1):  # 0 is the embedding of EOS, the same for every text
        rewards_N = probe(states_N_D[: len(train)], ratings_N, states_N_D[len(train) :])
        measured = pair_accuracy([(reward,) for reward in rewards_N.tolist()], validation, min_gap=RECIPE.min_gap)
        table[layer] = round(100 * measured.accuracy, 2)
    result = {
        "validation_pair_accuracy_by_layer": table,
        "train_texts": len(train),
        "ridge": RIDGE,
        "provenance": provenance(),
    }
    results.write_text(json.dumps(result, indent=2) + "\n")
    typer.echo(json.dumps(result))


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
        positions = range(len(states), len(states) + len(batch))
        states_N_L_D = torch.stack([states_N_T_D[rows_N, last_N] for states_N_T_D in output.hidden_states], dim=1)
        states.extend(states_N_L_D.float())
        return [float(position) for position in positions]

    # score_all batches by length and returns the values in the order of rendered_N: here each state's position.
    order_N = [int(position) for position in score_all(read, rendered_N)]
    return torch.stack(states)[order_N].transpose(0, 1).clone()


if __name__ == "__main__":
    typer.run(main)
