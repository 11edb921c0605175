"""The baseline of `benchmarks.movie_sentiment`: a linear head on the frozen trunk's last hidden states.

The head reads the states averaged over each text. It is trained with the same Bradley-Terry loss on the same texts as
the adapter, and uses all layers of the trunk where the adapter uses the lower ones.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel

from reranker.models.bundled import resolve
from reranker.models.device import computes_bfloat16
from reranker.models.rendering import Rendered, pad
from reranker.models.reward_model import make_renderer
from training.data.preferences import PreferenceRow, ordered_pairs, render_rows
from training.reward.config import RewardTraining
from training.reward.evaluate import score_all
from training.reward.train import bradley_terry_loss

LEARNING_RATE = 3e-3
WEIGHT_DECAY = 0.1

ScoreRows = Callable[[list[PreferenceRow], Path], list[tuple[float, ...]]]
"""(rated texts, the file that errors name) -> a reward for each row."""


def train_linear_head(
    train: list[PreferenceRow], source: Path, settings: RewardTraining, *, steps: int = 600, texts_per_step: int = 512
) -> ScoreRows:
    """Trains a head on rated texts, with the trunk, style, minimum rating gap and seed of the settings."""
    base = resolve(settings.base_model)
    trunk = AutoModel.from_pretrained(base, dtype=torch.float32).eval()
    renderer = make_renderer(base, trunk, settings.style)

    def states(rows: list[PreferenceRow], source: Path) -> torch.Tensor:
        return _mean_states(trunk, [row.rendered[0] for row in render_rows(rows, renderer, source)])

    states_N_D = states(train, source)
    center_D, scale_D = states_N_D.mean(0), states_N_D.std(0)
    states_N_D = (states_N_D - center_D) / scale_D
    ratings_N = torch.tensor([row.ratings[0] for row in train])
    generator = torch.Generator().manual_seed(settings.seed)
    weights_D = torch.zeros(states_N_D.shape[1], requires_grad=True)
    optimizer = torch.optim.AdamW([weights_D], lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    for _ in range(steps):
        chosen = torch.randperm(len(ratings_N), generator=generator)[:texts_per_step]
        better_K, worse_K = ordered_pairs(ratings_N[chosen], torch.zeros(len(chosen)), settings.min_gap)
        optimizer.zero_grad()
        torch.autograd.backward([bradley_terry_loss(states_N_D[chosen] @ weights_D, better_K, worse_K)])
        optimizer.step()
    trained_D = weights_D.detach()

    def score(rows: list[PreferenceRow], source: Path) -> list[tuple[float, ...]]:
        return [(reward,) for reward in (((states(rows, source) - center_D) / scale_D) @ trained_D).tolist()]

    return score


@torch.inference_mode()
def _mean_states(trunk: Any, rendered_N: list[Rendered]) -> torch.Tensor:
    """states_N_D: the last hidden states averaged over each text, in the order of rendered_N."""
    states: list[torch.Tensor] = []

    def pool(batch: list[Rendered]) -> list[float]:
        input_ids_N_T, mask_N_T = pad(batch, pad_id=0)
        with torch.autocast("cpu", torch.bfloat16, enabled=computes_bfloat16("cpu")):
            states_N_T_D = trunk(input_ids=input_ids_N_T, attention_mask=mask_N_T, use_cache=False).last_hidden_state
        weights_N_T_1 = mask_N_T[:, :, None] / mask_N_T.sum(1)[:, None, None]
        positions = range(len(states), len(states) + len(batch))
        states.extend((states_N_T_D * weights_N_T_1).sum(1))
        return [float(position) for position in positions]

    # score_all batches by length and returns the values in the order of rendered_N: here each state's position.
    order_N = [int(position) for position in score_all(pool, rendered_N)]
    return torch.stack(states)[order_N].clone()
