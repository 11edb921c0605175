"""Plots of a run's summary and of its calibration; written only if matplotlib is installed."""

from pathlib import Path
from typing import Any


def plot_summary(summary: dict[str, Any], path: Path) -> bool:
    """Mean reward with its interval against n and against the bound on the KL divergence; False without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return False
    curve = summary["reward_at_n"]
    n = [int(size) for size in curve]
    low, mean, high, kl = (
        [point[name] for point in curve.values()] for name in ("low", "mean", "high", "kl_upper_bound")
    )
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    panels = ((n, "n"), (kl, "KL to the policy, upper bound (nats)"))
    for axes, (x, label) in zip(figure.subplots(1, 2, sharey=True), panels, strict=True):
        axes.fill_between(x, low, high, alpha=0.25, linewidth=0)
        axes.plot(x, mean, marker="." if len(n) < 20 else "")
        axes.set_xlabel(label)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("mean reward of the best of n")
    figure.suptitle(f"{summary['prompts']:,} prompts, 95 % intervals", fontsize=10)
    figure.savefig(path, dpi=150)
    return True


def plot_calibration(calibration: dict[str, Any], path: Path) -> bool:
    """Mean reward against tokens of plain best-of-n and of adaptive stopping, with the recommended setting marked."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return False
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    for name in ("plain", "adaptive"):
        curve = calibration[name]
        tokens = [setting["tokens"] for setting in curve]
        low, mean, high = ([setting["reward"][bound] for setting in curve] for bound in ("low", "mean", "high"))
        axes.fill_between(tokens, low, high, alpha=0.12, linewidth=0)
        axes.plot(tokens, mean, marker=".", label={"plain": "best of n", "adaptive": "adaptive stopping"}[name])
    best = calibration["recommended"]
    axes.plot(best["tokens"]["mean"], best["reward"]["mean"], "k*", markersize=13, label="recommended")
    axes.set_xlabel("tokens generated per request")
    axes.set_ylabel("mean reward of the winner")
    axes.set_title(f"{calibration['prompts']:,} prompts, 95 % intervals", fontsize=10)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    return True
