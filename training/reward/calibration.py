"""Whether differences of rewards are the odds they claim to be.

By Bradley and Terry's model the better of two texts wins with probability sigma(its lead), where the lead is the
difference of the two rewards. Two figures ask whether that holds on held-out comparisons: the log loss, and the
reliability curve (Guo et al., "On Calibration of Modern Neural Networks", arXiv 1706.04599), which sorts comparisons by
how sure the model is of its favourite and counts how often the favourite was the better one.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

BINS = 10


@dataclass(frozen=True, slots=True)
class ReliabilityBin:
    """Comparisons the model is about equally sure of: mean predicted probability of its favourite, share it won."""

    predicted: float
    won: float
    comparisons: int


def log_loss(leads_K: torch.Tensor) -> float:
    """Mean of -log sigma(lead of the better text) in nats; a coin has ln 2 = 0.693."""
    return float(-F.logsigmoid(leads_K).mean())


def reliability_curve(leads_K: torch.Tensor, bins: int = BINS) -> list[ReliabilityBin]:
    """Bins of equal width over the predicted probability of the favourite, from 1/2 to 1; empty ones are left out.

    `leads_K` are the leads of the better texts; where one is negative, the worse text was the favourite. A tie is
    predicted with 1/2 and half won.
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
    """Mean distance of predicted and won, each bin weighed by its comparisons (expected calibration error)."""
    total = sum(point.comparisons for point in curve)
    return sum(point.comparisons * abs(point.predicted - point.won) for point in curve) / total
