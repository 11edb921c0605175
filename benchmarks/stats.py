"""Means with intervals, percentiles, ratios, and the writer of result files."""

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
    """The 50th, 95th and 99th percentile, interpolated between neighbouring values."""
    cuts = statistics.quantiles([*values, *values[-1:]] if len(values) == 1 else values, n=100, method="inclusive")
    return {f"p{percent}": cuts[percent - 1] for percent in (50, 95, 99)}


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and extremes of a figure over rounds, and the number of rounds."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values), "rounds": len(values)}


def paired_ratio(above: Sequence[float], below: Sequence[float]) -> dict[str, float]:
    """The spread of the ratio of two figures that were measured alternately, taken round by round."""
    return spread([a / b for a, b in zip(above, below, strict=True)])


def knee(costs: Sequence[float], gains: Sequence[float]) -> int:
    """The index of the knee of a rising curve: the point furthest above the line from its first to its last point.

    Kneedle without smoothing (Satopää et al. 2011), both axes scaled to 0 … 1.
    """
    spans = costs[-1] - costs[0], gains[-1] - gains[0]
    above = [
        (gain - gains[0]) / spans[1] - (cost - costs[0]) / spans[0] for cost, gain in zip(costs, gains, strict=True)
    ]
    return above.index(max(above))


def write_result(name: str, result: dict[str, Any]) -> Path:
    """Writes `benchmarks/results/NAME.json` and prints the result, without its samples, as the last line of output."""
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    print(json.dumps({**result, "samples": "…"} if "samples" in result else result))
    return path
