"""Draws every figure from benchmarks/results alone: `python -m benchmarks.plot`."""

import json
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot as plt  # the backend first: there may be no display

from benchmarks.birth import RESULTS

FIGURES = RESULTS.parent / "figures"
WINNER, JUDGE = "#1f5fa8", "#c2571a"


def quality(result: dict[str, Any]) -> Path:
    """Reward of the winner and the independent judge against N, with their 95 % intervals."""
    best_of = [int(n) for n in result["winner_reward"]]
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    panels = [
        ("winner_reward", f"reward of the winner\n({result['reward_model']})", WINNER),
        ("winner_vader", "independent judge\n(VADER lexicon, -1 to 1)", JUDGE),
    ]
    for axis, (key, label, colour) in zip(axes, panels, strict=True):
        means = [one["mean"] for one in result[key].values()]
        below = [one["mean"] - one["low"] for one in result[key].values()]
        above = [one["high"] - one["mean"] for one in result[key].values()]
        axis.errorbar(best_of, means, yerr=[below, above], marker="o", capsize=4, color=colour)
        axis.set_xscale("log", base=2)
        axis.set_xticks(best_of, [str(n) for n in best_of])
        axis.set_xlabel("best_of")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{result['policy']}, {result['prompts']} film-review openings, 95 % intervals", fontsize=10)
    path = FIGURES / "quality.png"
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def main() -> None:
    FIGURES.mkdir(exist_ok=True)
    print(f"wrote {quality(json.loads((RESULTS / 'quality.json').read_text()))}")


if __name__ == "__main__":
    main()
