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
CURVES = (("#222222", "^"), ("#7a3fa0", "D"), ("#1f5fa8", "o"), ("#2e8b57", "s"), ("#c2571a", "v"))
"""Told apart by colour and by marker."""


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


def arithmetic(result: dict[str, Any]) -> Path:
    """Share of right answers against n, a curve for each way to choose, with 95 % intervals over problems."""
    figure, axis = plt.subplots(figsize=(7, 4.4), layout="constrained")
    for (name, curve), (colour, marker) in zip(result["curves"].items(), CURVES, strict=True):
        n = [int(one) for one in curve]
        axis.plot(n, [100 * one["mean"] for one in curve.values()], marker=marker, color=colour, label=name)
        low, high = ([100 * one[bound] for one in curve.values()] for bound in ("low", "high"))
        axis.fill_between(n, low, high, color=colour, alpha=0.1, linewidth=0)
    axis.axhline(100 * result["greedy"]["mean"], color="#555555", linestyle="--", label="greedy, one answer")
    axis.set_xscale("log", base=2)
    axis.set_xticks(n, [str(one) for one in n])
    axis.set_xlabel("n")
    axis.set_ylabel("right answers, %")
    axis.set_ylim(0, 100)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=8, frameon=False)
    axis.set_title(
        f"{result['policy']}, {result['problems']['test']} arithmetic word problems, 95 % intervals", fontsize=10
    )
    path = FIGURES / "arithmetic.png"
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


DRAWN = {"quality": quality, "arithmetic": arithmetic}


def main() -> None:
    FIGURES.mkdir(exist_ok=True)
    for name, draw in DRAWN.items():
        print(f"wrote {draw(json.loads((RESULTS / f'{name}.json').read_text()))}")


if __name__ == "__main__":
    main()
