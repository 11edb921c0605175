"""Means with intervals, and how a benchmark hands in its figures."""

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.birth import RESULTS


def mean_with_interval(values: Sequence[float]) -> dict[str, float]:
    """Mean, its 95 % interval by the normal approximation (± 1.96 s/√n), standard deviation s and n."""
    mean, spread = statistics.fmean(values), statistics.stdev(values)
    half = 1.96 * spread / math.sqrt(len(values))
    return {"mean": mean, "low": mean - half, "high": mean + half, "sd": spread, "n": len(values)}


def paired_ratio(above: Sequence[float], below: Sequence[float]) -> dict[str, float]:
    """The ratio of two times measured in turn, round by round: median, extremes and number of rounds."""
    ratios = [a / b for a, b in zip(above, below, strict=True)]
    return {"median": statistics.median(ratios), "low": min(ratios), "high": max(ratios), "rounds": len(ratios)}


def hand_in(name: str, result: dict[str, Any]) -> Path:
    """Writes `benchmarks/results/NAME.json` and prints the result as the last line."""
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    print(json.dumps({**result, "samples": "…"} if "samples" in result else result))
    return path
