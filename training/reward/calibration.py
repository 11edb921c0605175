"""Whether reward differences are calibrated: whether they predict how often the preferred text is the better one.

By Bradley and Terry's model the better of two texts wins with probability sigma(its lead), where the lead is the
difference of the two rewards. Two figures test this on held-out comparisons: the log loss, and the reliability curve
(Guo et al., "On Calibration of Modern Neural Networks", arXiv 1706.04599). The curve bins comparisons by the predicted
probability of the model's favourite, the text with the higher reward, and counts how often the favourite was better.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

BINS = 10


@dataclass(frozen=True, slots=True)
class ReliabilityBin:
    """Comparisons of about equal predicted probability: the mean prediction, and the share that the favourite won."""

    predicted: float
    won: float
    comparisons: int


def log_loss(leads_K: torch.Tensor) -> float:
    """Mean of -log sigma(lead of the better text) in nats; a coin toss has ln 2 = 0.693."""
    return float(-F.logsigmoid(leads_K).mean())


def reliability_curve(leads_K: torch.Tensor, bins: int = BINS) -> list[ReliabilityBin]:
    """Bins of equal width over the predicted probability of the favourite, from 1/2 to 1; empty ones are left out.

    `leads_K` are the leads of the better texts; where a lead is negative, the worse text was the favourite. A tie is
    predicted with 1/2 and counts as half won.
    """
    predicted_K = torch.sigmoid(leads_K.abs())
    won_K = (leads_K > 0).double() + 0.5 * (leads_K == 0).double()
    bin_K = ((predicted_K - 0.5) * 2 * bins).long().clamp(max=bins - 1)
    curve = []
    for index in range(bins):
        inside_K = bin_K == index
        if count := int(inside_K.sum()):
            curve.append(ReliabilityBin(float(predicted_K[inside_K].mean()), float(won_K[inside_K].mean()), count))
    return curve


def calibration_error(curve: list[ReliabilityBin]) -> float:
    """Expected calibration error: mean distance of predicted and won, each bin weighted by its comparisons."""
    total = sum(point.comparisons for point in curve)
    return sum(point.comparisons * abs(point.predicted - point.won) for point in curve) / total
