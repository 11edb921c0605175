"""How often a scorer picks a right answer among several: RewardBench 2's measure (arXiv 2506.01937).

A row with right and wrong answers earns 1 if every right one scores above every wrong one, and 1/k if the lowest right
one shares its score with k - 1 wrong ones; a NaN among the scores earns nothing. For one right and three wrong answers,
as in all subsets of RewardBench 2 but one, that is the accuracy of its leaderboard, where a coin gets 25%. Its subset
Ties, with several right answers, is scored there by a sum of further terms; what is counted here is the accuracy alone.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from training.data.preferences import PreferenceRow
from training.reward.pair_accuracy import RESAMPLES


@dataclass(frozen=True, slots=True)
class BestOfNAccuracy:
    """Mean credit of the rows, its 95% interval by bootstrap over rows, and what chance would get."""

    accuracy: float
    low: float
    high: float
    chance: float
    rows: int


def best_of_n_accuracy(
    rewards: Sequence[tuple[float, ...]], rows: Sequence[PreferenceRow]
) -> dict[str, BestOfNAccuracy]:
    """The measure for `all` rows of more than two answers and for each subset they name; empty if there are none."""
    earned_by_name: dict[str, list[tuple[float, float]]] = {}
    for scores, row in zip(rewards, rows, strict=True):
        if len(row.texts) > 2:
            earned = (_credit(scores, row.ratings), _chance(row.ratings))
            for name in ("all", row.subset) if row.subset else ("all",):
                earned_by_name.setdefault(name, []).append(earned)
    return {name: _mean(earned) for name, earned in earned_by_name.items()}


def _credit(scores: tuple[float, ...], ratings: tuple[float, ...]) -> float:
    right = [score for score, rating in zip(scores, ratings, strict=True) if rating > 0]
    wrong = [score for score, rating in zip(scores, ratings, strict=True) if not rating > 0]
    if any(math.isnan(score) for score in scores) or min(right) < max(wrong):
        return 0.0
    return 1 / (1 + wrong.count(min(right)))


def _chance(ratings: tuple[float, ...]) -> float:
    return 1 / math.comb(len(ratings), sum(rating > 0 for rating in ratings))


def _mean(earned: list[tuple[float, float]]) -> BestOfNAccuracy:
    credits_M, chances_M = torch.tensor(earned, dtype=torch.float64).T
    generator = torch.Generator().manual_seed(0)
    means_S = torch.stack(
        [credits_M[torch.randint(len(earned), (len(earned),), generator=generator)].mean() for _ in range(RESAMPLES)]
    )
    low, high = means_S.quantile(torch.tensor([0.025, 0.975]).double()).tolist()
    return BestOfNAccuracy(float(credits_M.mean()), low, high, float(chances_M.mean()), len(earned))
