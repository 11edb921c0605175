"""Means with intervals, and how a benchmark hands in its figures."""

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.provenance import RESULTS


def mean_with_interval(values: Sequence[float]) -> dict[str, float]:
    """Mean, its 95 % interval by the normal approximation (± 1.96 s/√n), standard deviation s and n."""
    mean, spread = statistics.fmean(values), statistics.stdev(values)
    half = 1.96 * spread / math.sqrt(len(values))
    return {"mean": mean, "low": mean - half, "high": mean + half, "sd": spread, "n": len(values)}


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """The 50th, 95th and 99th, between the values where they fall between."""
    cuts = statistics.quantiles([*values, *values[-1:]] if len(values) == 1 else values, n=100, method="inclusive")
    return {f"p{percent}": cuts[percent - 1] for percent in (50, 95, 99)}


def paired_ratio(above: Sequence[float], below: Sequence[float]) -> dict[str, float]:
    """The ratio of two times measured in turn, round by round: median, extremes and number of rounds."""
    ratios = [a / b for a, b in zip(above, below, strict=True)]
    return {"median": statistics.median(ratios), "low": min(ratios), "high": max(ratios), "rounds": len(ratios)}


def knee(costs: Sequence[float], gains: Sequence[float]) -> int:
    """Which point of a rising curve bends most: the one furthest above the line from its first to its last point.

    Kneedle without smoothing (Satopää et al. 2011), both axes scaled to 0 … 1.
    """
    spans = costs[-1] - costs[0], gains[-1] - gains[0]
    above = [
        (gain - gains[0]) / spans[1] - (cost - costs[0]) / spans[0] for cost, gain in zip(costs, gains, strict=True)
    ]
    return above.index(max(above))


def hand_in(name: str, result: dict[str, Any]) -> Path:
    """Writes `benchmarks/results/NAME.json` and prints the result as the last line."""
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    print(json.dumps({**result, "samples": "…"} if "samples" in result else result))
    return path
