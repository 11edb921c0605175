"""How often a scorer puts two texts in the order people did.

Two texts of a group whose ratings are `min_gap` or more apart are a comparison; it is won if the better one scores
higher, and half won in a tie. Comparisons that share a text are not independent, so the 95% interval is a bootstrap
over rows (rated texts, or pairs) and not over comparisons: rows are drawn anew with replacement, and a comparison
counts as often as both its rows were drawn.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from training.preference_data import ordered_pairs

RESAMPLES = 1000


class Rated(Protocol):
    """What a row tells: ratings of its texts, and the group they compare in."""

    @property
    def ratings(self) -> tuple[float, ...]: ...

    @property
    def group(self) -> int: ...


@dataclass(frozen=True, slots=True)
class PairAccuracy:
    """Share of comparisons in the right order, its 95% interval, and how many comparisons and rows it stands on."""

    accuracy: float
    low: float
    high: float
    comparisons: int
    rows: int


def pair_accuracy(
    rewards: Sequence[tuple[float, ...]],
    rows: Sequence[Rated],
    *,
    min_gap: float,
    max_gap: float = math.inf,
    seed: int = 0,
) -> PairAccuracy:
    """Accuracy over comparisons with min_gap <= gap, and gap < max_gap where that is finite.

    `rewards` holds for each row one reward per text. A NaN reward never wins.

    Raises:
        ValueError: there is nothing to compare.
    """
    leads_K, first_K, second_K = _comparisons(rewards, rows, min_gap, max_gap)
    wins_K = (leads_K > 0).double() + 0.5 * (leads_K == 0).double()
    generator = torch.Generator().manual_seed(seed)
    resampled: list[float] = []
    for _ in range(RESAMPLES):
        drawn = torch.randint(len(rows), (len(rows),), generator=generator)
        times = torch.bincount(drawn, minlength=len(rows)).double()
        weights_K = torch.where(first_K == second_K, times[first_K], times[first_K] * times[second_K])
        if (total := float(weights_K.sum())) > 0:
            resampled.append(float(weights_K @ wins_K) / total)
    low, high = torch.tensor(resampled, dtype=torch.float64).quantile(torch.tensor([0.025, 0.975]).double()).tolist()
    return PairAccuracy(float(wins_K.mean()), low, high, len(leads_K), len(rows))


def leads_of_the_better(rewards: Sequence[tuple[float, ...]], rows: Sequence[Rated], *, min_gap: float) -> torch.Tensor:
    """leads_K: for every comparison the reward of the better text less that of the worse.

    Raises:
        ValueError: there is nothing to compare.
    """
    return _comparisons(rewards, rows, min_gap, math.inf)[0]


def _comparisons(
    rewards: Sequence[tuple[float, ...]], rows: Sequence[Rated], min_gap: float, max_gap: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(leads_K, row of the better text, row of the worse)."""
    scores_N = torch.tensor([score for row in rewards for score in row], dtype=torch.float64)
    ratings_N = torch.tensor([rating for row in rows for rating in row.ratings], dtype=torch.float64)
    groups_N = torch.tensor([row.group for row in rows for _ in row.ratings])
    rows_N = torch.tensor([index for index, row in enumerate(rows) for _ in row.ratings])
    better_K, worse_K = ordered_pairs(ratings_N, groups_N, min_gap)
    if math.isfinite(max_gap):
        within_K = ratings_N[better_K] - ratings_N[worse_K] < max_gap
        better_K, worse_K = better_K[within_K], worse_K[within_K]
    if len(better_K) == 0:
        raise ValueError(f"no two texts are rated {min_gap:g} or more apart, so there is nothing to compare")
    return scores_N[better_K] - scores_N[worse_K], rows_N[better_K], rows_N[worse_K]
