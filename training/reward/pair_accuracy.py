"""Pair accuracy: how often a scorer orders two texts as their human ratings do.

Two texts of a group whose ratings are `min_gap` or more apart are a comparison. It is won if the better text scores
higher, and half won in a tie. Comparisons that share a text are not independent, so the 95% interval is a bootstrap
over rows (rated texts, or pairs) and not over comparisons: rows are resampled with replacement, and a comparison counts
t_i * t_j times if its rows were drawn t_i and t_j times.

All comparisons are counted, without sampling: 5,000 rated texts make 12 million. So the draws are not computed in turn:
with W the matrix of wins of row over row and t the times that each row was drawn, the number of won comparisons is
t' W t, one matrix product for all draws.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from training.data.preferences import GAP_ROUNDING, ordered_pairs

RESAMPLES = 1000
ROWS_AT_ONCE = 512
"""Rows of the matrix of comparisons that are in memory at a time."""
TIMES_AT_ONCE = 2**26
"""Counts of drawn rows that are in memory at a time, 4 bytes each."""


class Rated(Protocol):
    """A row's ratings, one per text, and the group within which its texts are compared."""

    @property
    def ratings(self) -> tuple[float, ...]: ...

    @property
    def group(self) -> int: ...


@dataclass(frozen=True, slots=True)
class PairAccuracy:
    """Share of comparisons in the right order, its 95% interval, and the number of comparisons and rows."""

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
    resampled_S = _resampled(wins_K, first_K, second_K, len(rows), seed)
    low, high = resampled_S.quantile(torch.tensor([0.025, 0.975]).double()).tolist()
    return PairAccuracy(float(wins_K.mean()), low, high, len(leads_K), len(rows))


def better_leads(rewards: Sequence[tuple[float, ...]], rows: Sequence[Rated], *, min_gap: float) -> torch.Tensor:
    """leads_K: for every comparison, the reward of the better text minus the reward of the worse.

    Raises:
        ValueError: there is nothing to compare.
    """
    return _comparisons(rewards, rows, min_gap, math.inf)[0]


def _resampled(
    wins_K: torch.Tensor, first_K: torch.Tensor, second_K: torch.Tensor, rows: int, seed: int
) -> torch.Tensor:
    """accuracies_S of S resamples of the rows, without the resamples that hold no comparison."""
    generator = torch.Generator().manual_seed(seed)
    accuracies: list[torch.Tensor] = []
    while (missing := RESAMPLES - sum(map(len, accuracies))) > 0:
        draws = [
            torch.randint(rows, (rows,), generator=generator) for _ in range(min(missing, TIMES_AT_ONCE // rows + 1))
        ]
        times_N_S = torch.stack([torch.bincount(drawn, minlength=rows).float() for drawn in draws], dim=1)
        won_S = _count(wins_K, first_K, second_K, times_N_S)
        accuracies.append(won_S / _count(torch.ones_like(wins_K), first_K, second_K, times_N_S))
    accuracies_S = torch.cat(accuracies)
    return accuracies_S[accuracies_S.isfinite()]  # 0/0 where a resample holds no comparison


def _count(
    values_K: torch.Tensor, first_K: torch.Tensor, second_K: torch.Tensor, times_N_S: torch.Tensor
) -> torch.Tensor:
    """sums_S of the values, each weighted by the times that its rows were drawn: t_i * t_j, or t_i within a row.

    Exact in float32: the values are halves and whole numbers, and the sum of a row stays far below 2^23.
    """
    within_K = first_K == second_K
    own_N = torch.zeros(len(times_N_S)).index_add_(0, first_K[within_K], values_K[within_K].float())
    sums_S = own_N.double() @ times_N_S.double()
    first_K, second_K, values_K = first_K[~within_K], second_K[~within_K], values_K[~within_K].float()
    for start in range(0, len(times_N_S), ROWS_AT_ONCE):
        times_R_S = times_N_S[start : start + ROWS_AT_ONCE]
        here_K = (first_K >= start) & (first_K < start + ROWS_AT_ONCE)
        if here_K.any():
            values_R_N = torch.zeros(len(times_R_S), len(times_N_S))
            values_R_N.index_put_((first_K[here_K] - start, second_K[here_K]), values_K[here_K], accumulate=True)
            sums_S += ((values_R_N @ times_N_S).double() * times_R_S).sum(0)
    return sums_S


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
        within_K = ratings_N[better_K] - ratings_N[worse_K] < max_gap - GAP_ROUNDING
        better_K, worse_K = better_K[within_K], worse_K[within_K]
    if len(better_K) == 0:
        raise ValueError(f"no two texts are rated {min_gap:g} or more apart, so there is nothing to compare")
    return scores_N[better_K] - scores_N[worse_K], rows_N[better_K], rows_N[worse_K]
