"""The curve of a run's summary as a picture; drawn where matplotlib is installed."""

from pathlib import Path
from typing import Any


def plot_summary(summary: dict[str, Any], path: Path) -> bool:
    """Mean reward with its interval against n and against the bound on the KL divergence; False without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return False
    points = summary["reward_at_n"]
    sizes = [int(n) for n in points]
    low, mean, high, kl = ([one[name] for one in points.values()] for name in ("low", "mean", "high", "kl_upper_bound"))
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    panels = ((sizes, "n"), (kl, "KL to the policy, upper bound (nats)"))
    for axes, (places, label) in zip(figure.subplots(1, 2, sharey=True), panels, strict=True):
        axes.fill_between(places, low, high, alpha=0.25, linewidth=0)
        axes.plot(places, mean, marker="." if len(sizes) < 20 else "")
        axes.set_xlabel(label)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("mean reward of the best of n")
    figure.suptitle(f"{summary['prompts']:,} prompts, 95 % intervals", fontsize=10)
    figure.savefig(path, dpi=150)
    return True
