"""Measures a reward model on preferences.

pair accuracy       how often it orders two texts as people did: over all pairs, and by the difference of the ratings
log loss, curve     whether its reward differences are calibrated; see `training.reward.calibration`
length alone        the pair accuracy of preferring the longer text, which a reward model has to beat
best-of-n accuracy  for rows with several answers; see `training.reward.best_of_n_accuracy`
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from reranker.models.rendering import Rendered
from reranker.models.reward_model import RewardModel
from training.data.data_source import Source
from training.data.preferences import DataError, PreferenceRow, has_comparison, read_rows, render_rows
from training.reward.best_of_n_accuracy import BestOfNAccuracy, best_of_n_accuracy
from training.reward.calibration import ReliabilityBin, calibration_error, log_loss, reliability_curve
from training.reward.pair_accuracy import PairAccuracy, better_leads, pair_accuracy

BATCH_TOKENS = 2048
"""Tokens of one scoring batch, padding included: enough to use the hardware well, and few enough for any memory."""


@dataclass(frozen=True, slots=True)
class RewardEvaluation:
    """All measurements; `log_loss` is in nats.

    `by_gap` holds the pair accuracy by difficulty: name of a range of rating gaps -> accuracy. It includes the
    comparisons below the smallest gap, which `overall` leaves out because people may disagree about their order.
    `best_of_n`: `all` and the subsets named in the data -> accuracy; empty without rows of several answers.
    """

    overall: PairAccuracy
    by_gap: dict[str, PairAccuracy]
    length_alone: PairAccuracy
    log_loss: float
    calibration_error: float
    reliability: list[ReliabilityBin]
    best_of_n: dict[str, BestOfNAccuracy]


def evaluate_reward(model: RewardModel, source: Source, *, min_gap: float = 1.0) -> RewardEvaluation:
    """Measures the model on the data.

    Raises:
        training.data.preferences.DataError: rows that cannot be used, or no comparison among them.
    """
    rows = read_rows(source)
    if not has_comparison(rows, min_gap):
        raise DataError(
            source, [(1, f"no two texts are rated {min_gap:g} or more apart, so there is nothing to compare")]
        )
    return accuracies(score_rows(model, rows, source), rows, min_gap=min_gap)


def accuracies(
    rewards: Sequence[tuple[float, ...]], rows: Sequence[PreferenceRow], *, min_gap: float
) -> RewardEvaluation:
    """The evaluation of given rewards; `rewards` holds one tuple per row, with one reward per text."""
    edges = [0.0, *(min_gap + step for step in range(4)), math.inf]
    by_gap: dict[str, PairAccuracy] = {}
    for low, high in itertools.pairwise(edges):
        name = f"{low:g} to {high:g}" if math.isfinite(high) else f"{low:g} and more"
        try:
            by_gap[name] = pair_accuracy(rewards, rows, min_gap=low, max_gap=high)
        except ValueError:
            continue  # no two ratings are that far apart
    leads_K = better_leads(rewards, rows, min_gap=min_gap)
    reliability = reliability_curve(leads_K)
    lengths = [tuple(float(len(text)) for text in row.texts) for row in rows]
    return RewardEvaluation(
        overall=pair_accuracy(rewards, rows, min_gap=min_gap),
        by_gap=by_gap,
        length_alone=pair_accuracy(lengths, rows, min_gap=min_gap),
        log_loss=log_loss(leads_K),
        calibration_error=calibration_error(reliability),
        reliability=reliability,
        best_of_n=best_of_n_accuracy(rewards, rows),
    )


def score_rows(model: RewardModel, rows: list[PreferenceRow], source: Source) -> list[tuple[float, ...]]:
    """Scores all rows; the result holds one tuple per row, with one reward per text."""
    examples = render_rows(rows, model.renderer, source)
    rewards = iter(score_all(model.score, [rendered for example in examples for rendered in example.rendered]))
    return [tuple(itertools.islice(rewards, len(row.texts))) for row in rows]


def score_all(score: Callable[[list[Rendered]], list[float]], rendered_N: Sequence[Rendered]) -> list[float]:
    """rewards_N in the order of `rendered_N`, computed in batches of texts of similar length."""
    rewards_N = [math.nan] * len(rendered_N)
    batch: list[int] = []
    for index in sorted(range(len(rendered_N)), key=lambda i: len(rendered_N[i].token_ids)):
        if batch and (len(batch) + 1) * len(rendered_N[index].token_ids) > BATCH_TOKENS:
            _fill(rewards_N, score, rendered_N, batch)
            batch = []
        batch.append(index)
    if batch:
        _fill(rewards_N, score, rendered_N, batch)
    return rewards_N


def _fill(
    rewards_N: list[float],
    score: Callable[[list[Rendered]], list[float]],
    rendered_N: Sequence[Rendered],
    batch: list[int],
) -> None:
    for index, reward in zip(batch, score([rendered_N[i] for i in batch]), strict=True):
        rewards_N[index] = reward
