"""Best-of-n accuracy: how often a scorer picks a right answer among several, as in RewardBench 2 (arXiv 2506.01937).

A row with right and wrong answers has the credit 1 if every right answer scores above every wrong answer, and 1/k if
the lowest right answer ties with k - 1 wrong answers; it has the credit 0 if a score is NaN. For one right and three
wrong answers, as in all subsets of RewardBench 2 but one, this is the accuracy of its leaderboard, where chance is 25%.
RewardBench 2 scores its subset Ties, with several right answers, by a sum of further terms; here only the accuracy
counts.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from training.data.preferences import PreferenceRow
from training.reward.pair_accuracy import RESAMPLES


@dataclass(frozen=True, slots=True)
class BestOfNAccuracy:
    """Mean credit of the rows, its 95% interval by bootstrap over rows, and the mean credit of random scores."""

    accuracy: float
    low: float
    high: float
    chance: float
    rows: int


def best_of_n_accuracy(
    rewards: Sequence[tuple[float, ...]], rows: Sequence[PreferenceRow]
) -> dict[str, BestOfNAccuracy]:
    """The accuracy of `all` rows with more than two answers, and of each subset they name; empty without such rows."""
    credits_by_name: dict[str, list[tuple[float, float]]] = {}
    for scores, row in zip(rewards, rows, strict=True):
        if len(row.texts) > 2:
            credit_and_chance = (_credit(scores, row.ratings), _chance(row.ratings))
            for name in ("all", row.subset) if row.subset else ("all",):
                credits_by_name.setdefault(name, []).append(credit_and_chance)
    return {name: _mean(row_credits) for name, row_credits in credits_by_name.items()}


def _credit(scores: tuple[float, ...], ratings: tuple[float, ...]) -> float:
    right = [score for score, rating in zip(scores, ratings, strict=True) if rating > 0]
    wrong = [score for score, rating in zip(scores, ratings, strict=True) if not rating > 0]
    if any(math.isnan(score) for score in scores) or min(right) < max(wrong):
        return 0.0
    return 1 / (1 + wrong.count(min(right)))


def _chance(ratings: tuple[float, ...]) -> float:
    return 1 / math.comb(len(ratings), sum(rating > 0 for rating in ratings))


def _mean(row_credits: list[tuple[float, float]]) -> BestOfNAccuracy:
    """The mean of (credit, chance) over M rows."""
    rows = len(row_credits)
    credits_M, chances_M = torch.tensor(row_credits, dtype=torch.float64).T
    generator = torch.Generator().manual_seed(0)
    means_S = torch.stack(
        [credits_M[torch.randint(rows, (rows,), generator=generator)].mean() for _ in range(RESAMPLES)]
    )
    low, high = means_S.quantile(torch.tensor([0.025, 0.975]).double()).tolist()
    return BestOfNAccuracy(float(credits_M.mean()), low, high, float(chances_M.mean()), rows)
