"""Draws every figure whose result file exists, from benchmarks/results alone: `python -m benchmarks.plot`."""

import itertools
import json
from operator import itemgetter
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot as plt  # after the choice of the backend: there may be no display

from benchmarks.provenance import RESULTS
from benchmarks.stats import knee
from benchmarks.stopping import frontier

FIGURES = RESULTS.parent / "figures"
WINNER, JUDGE = "#1f5fa8", "#c2571a"
CURVES = (("#222222", "^"), ("#7a3fa0", "D"), ("#1f5fa8", "o"), ("#2e8b57", "s"), ("#c2571a", "v"))
"""(colour, marker) of each curve."""
TRAINED = (CURVES[1], CURVES[3], CURVES[4], CURVES[0])
"""Styles of trained policies; the curve of best-of-n is blue with circles."""
OF_POLICY = {
    "plain": CURVES[0],
    "adaptive": CURVES[1],
    "adaptive without a prior": CURVES[2],
    "speculative_rejection": CURVES[3],
    "adaptive_rejection": CURVES[4],
    "blockwise": CURVES[2],
}
MEASURES = {
    "reward": "mean reward ({reward_model})",
    "vader": "independent judge (VADER, -1 to 1)",
    "perplexity_under_base": "perplexity under the {base}",
}


def quality(result: dict[str, Any]) -> Path:
    """Reward and VADER score of the winner against N, with 95 % intervals."""
    best_of = [int(n) for n in result["winner_reward"]]
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    panels = [
        ("winner_reward", f"reward of the winner\n({result['reward_model']})", WINNER),
        ("winner_vader", "independent judge\n(VADER lexicon, -1 to 1)", JUDGE),
    ]
    for axis, (key, label, colour) in zip(axes, panels, strict=True):
        means = [interval["mean"] for interval in result[key].values()]
        below = [interval["mean"] - interval["low"] for interval in result[key].values()]
        above = [interval["high"] - interval["mean"] for interval in result[key].values()]
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
    """Share of correct answers against n, a curve for each selection strategy, with 95 % intervals over problems."""
    figure, axis = plt.subplots(figsize=(7, 4.4), layout="constrained")
    for (name, curve), (colour, marker) in zip(result["curves"].items(), CURVES, strict=True):
        sizes = [int(n) for n in curve]
        axis.plot(sizes, [100 * share["mean"] for share in curve.values()], marker=marker, color=colour, label=name)
        low, high = ([100 * share[bound] for share in curve.values()] for bound in ("low", "high"))
        axis.fill_between(sizes, low, high, color=colour, alpha=0.1, linewidth=0)
    axis.axhline(100 * result["greedy"]["mean"], color="#555555", linestyle="--", label="greedy, one answer")
    axis.set_xscale("log", base=2)
    axis.set_xticks(sizes, [str(n) for n in sizes])
    axis.set_xlabel("n")
    axis.set_ylabel("correct answers, %")
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


def improve(result: dict[str, Any]) -> Path:
    return against_kl(result, FIGURES / "improve.png")


def against_kl(result: dict[str, Any], path: Path, base: str = "base") -> Path:
    """Reward, VADER score and perplexity against KL to the base: best of n as a curve, trained policies as points.

    `base` is the name of the policy that training started from.
    """
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.8), layout="constrained")
    policies = result["policies_at_best_of_1"]
    for axis, measure in zip(axes, MEASURES, strict=True):
        _best_of_n_against_kl(axis, result, measure, base)
        for (name, figures), (colour, marker) in zip(policies.items(), TRAINED, strict=False):
            _point(axis, figures, measure, colour, marker, f"{name}, best_of 1")
    axes[0].legend(fontsize=7, frameon=False, loc="lower right")
    return _saved(figure, path, result)


def rl(result: dict[str, Any]) -> Path:
    """Reward of the training samples against minutes, and reward and VADER score against KL, a point for each seed."""
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.8), layout="constrained")
    for axis, measure in zip(axes[1:], ("reward", "vader"), strict=True):
        _best_of_n_against_kl(axis, result, measure)
    best_of_4 = result["best_of_n_of_the_base"]["4"]["reward"]["mean"]
    axes[0].axhline(best_of_4, color=WINNER, linestyle="--", label="best of 4 of the base")
    for (method, runs), (colour, marker) in zip(result["runs"].items(), TRAINED[1:], strict=False):
        for number, run in enumerate(runs.values()):
            label = f"{method}, {len(runs)} seeds" if number == 0 else None
            minutes = [seconds / 60 for seconds in itertools.accumulate(_step_s(row) for row in run["steps"])]
            axes[0].plot(minutes, [row["reward"] for row in run["steps"]], color=colour, alpha=0.7, label=label)
            for axis, measure in zip(axes[1:], ("reward", "vader"), strict=True):
                _point(axis, run["held_out"], measure, colour, marker, label)
    axes[0].set_xlabel("minutes of training")
    axes[0].set_ylabel("reward of the training samples")
    axes[0].grid(alpha=0.3)
    axes[0].spines[["top", "right"]].set_visible(False)
    for axis in axes[:2]:
        axis.legend(fontsize=7, frameon=False, loc="lower right")
    return _saved(figure, FIGURES / "rl.png", result)


def _step_s(row: dict[str, float]) -> float:
    return sum(seconds for name, seconds in row.items() if name.endswith("_s"))


def _best_of_n_against_kl(axis: Any, result: dict[str, Any], measure: str, base: str = "base") -> None:
    best = result["best_of_n_of_the_base"]
    kl = [figures["kl"]["mean"] for figures in best.values()]
    means, low, high = ([figures[measure][bound] for figures in best.values()] for bound in ("mean", "low", "high"))
    axis.plot(
        kl, means, marker="o", color=WINNER, label=f"best of n of the {base}, n = 1 … {max(map(int, best))} (KL: bound)"
    )
    axis.fill_between(kl, low, high, color=WINNER, alpha=0.12, linewidth=0)
    for n, x, y in zip(best, kl, means, strict=True):
        axis.annotate(n, (x, y), textcoords="offset points", xytext=(0, 6), ha="center", fontsize=7, color=WINNER)
    axis.set_xlabel(f"KL to the {base}, nats a sequence")
    axis.set_ylabel(MEASURES[measure].format(reward_model=result["reward_model"], base=base))
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)


def _point(axis: Any, figures: dict[str, Any], measure: str, colour: str, marker: str, label: str | None) -> None:
    """A policy's measure against its KL, each with its interval."""
    x, y = figures["kl"], figures[measure]
    axis.errorbar(
        x["mean"],
        y["mean"],
        xerr=[[x["mean"] - x["low"]], [x["high"] - x["mean"]]],
        yerr=[[y["mean"] - y["low"]], [y["high"] - y["mean"]]],
        marker=marker,
        color=colour,
        capsize=3,
        linestyle="none",
        label=label,
    )


def _saved(figure: Any, path: Path, result: dict[str, Any]) -> Path:
    figure.suptitle(
        f"{result['policy']}, {result['prompts']['held_out']} held-out film-review openings, "
        f"{result['max_tokens']} new tokens, 95 % intervals over prompts",
        fontsize=10,
    )
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def stopping(result: dict[str, Any]) -> Path:
    """Mean reward of the winner against tokens: plain best-of-n, and the best settings of each policy."""
    figure, axes = plt.subplots(1, len(result["plain"]), figsize=(11, 4), layout="constrained")
    for axis, (pools, plain) in zip(axes, result["plain"].items(), strict=True):
        tokens, means, low, high = (
            [figures[key] for figures in plain.values()] for key in ("tokens", "reward", "low", "high")
        )
        axis.plot(tokens, means, color=CURVES[0][0], marker=CURVES[0][1], markersize=3, label="plain best-of-n")
        axis.fill_between(tokens, low, high, color=CURVES[0][0], alpha=0.08, linewidth=0)
        goal = plain[str(result["plain_n"])]
        axis.plot(goal["tokens"], goal["reward"], marker="o", markersize=9, markerfacecolor="none", color=CURVES[0][0])
        for name, policy in result["policies"][pools].items():
            colour, marker = OF_POLICY[name]
            best = frontier(policy["curve"])
            x, y = [setting["tokens"] for setting in best], [setting["reward"] for setting in best]
            axis.plot(x, y, marker=marker, markersize=3, color=colour, label=name)
        axis.axhline(goal["reward"], color="#999999", linewidth=0.8, linestyle="--")
        axis.set_xlabel(f"{result['unit'][pools]} a prompt")
        axis.set_ylabel("mean reward of the winner")
        axis.set_title(f"{pools}, {result['prompts'][pools]} prompts", fontsize=10)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(fontsize=8, frameon=False, loc="lower right")
    path = FIGURES / "stopping.png"
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def latency(result: dict[str, Any]) -> Path:
    """Seconds of a request against N, in process and on Ray; against concurrency; and goodput against load."""
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    on_ray = RESULTS / "latency_ray.json"
    backends = {"in process": result} | ({"on Ray": json.loads(on_ray.read_text())} if on_ray.exists() else {})
    for (backend, figures), (colour, marker) in zip(backends.items(), (CURVES[2], CURVES[4]), strict=False):
        _seconds_against(axes[0], figures["candidates"], "best_of", colour, marker, backend)
    _seconds_against(axes[1], result["concurrency"], "at_once", *CURVES[2], "best_of 16")
    axes[0].set_xlabel("best_of, one request at a time")
    axes[1].set_xlabel("requests at a time")
    loads = result["goodput"]["loads"].values()
    rates = [load["requests_per_s"] for load in loads]
    axes[2].plot(rates, rates, color="#999999", linestyle="--", linewidth=0.8, label="requests sent")
    axes[2].plot(
        rates, [load["good"]["per_s"] for load in loads], color=CURVES[3][0], marker="s", label="answered in time"
    )
    axes[2].set_xlabel(f"requests a second, best_of {result['goodput']['best_of']}, Poisson")
    axes[2].set_ylabel(f"a second, within {result['goodput']['objective_s']:.1f} s")
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(fontsize=8, frameon=False)
    path = FIGURES / "latency.png"
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def _seconds_against(axis: Any, cases: list[Any], over: str, colour: str, marker: str, label: str) -> None:
    """Plots the median of `total_s`, with a band up to the 99th percentile."""
    x = [case[over] for case in cases]
    medians, highest = ([case["total_s"][key] for case in cases] for key in ("p50", "p99"))
    axis.plot(x, medians, color=colour, marker=marker, label=f"{label}, median to p99")
    axis.fill_between(x, medians, highest, color=colour, alpha=0.15, linewidth=0)
    axis.set_xscale("log", base=2)
    axis.set_xticks(x, [str(value) for value in x])
    axis.set_ylabel("seconds to the last token")
    axis.set_ylim(bottom=0)


def cost(result: dict[str, Any]) -> Path:
    """Mean reward against cost on the running engine: a curve for plain best-of-n and for every policy."""
    costs = {
        "tokens": "tokens generated a request",
        "total_s": "seconds a request, alone",
        "price": "price of a thousand requests",
    }
    figure, axes = plt.subplots(1, len(costs), figsize=(12, 3.8), layout="constrained", sharey=True)
    for axis, (unit, label) in zip(axes, costs.items(), strict=True):
        scale = 1000 if unit == "price" else 1
        for name, measured in result["curves"].items():
            curve, (colour, marker) = sorted(measured, key=itemgetter(unit)), OF_POLICY[name]
            spent = [scale * point[unit] for point in curve]
            rewards, low, high = ([point["reward"][key] for point in curve] for key in ("mean", "low", "high"))
            axis.plot(spent, rewards, color=colour, marker=marker, markersize=4, label=name)
            if name == "plain":
                axis.fill_between(spent, low, high, color=colour, alpha=0.08, linewidth=0)
                for n, x, y in zip((point["best_of"] for point in curve), spent, rewards, strict=True):
                    axis.annotate(str(n), (x, y), textcoords="offset points", xytext=(3, -10), fontsize=7)
                bend = knee(spent, rewards)
                axis.plot(
                    spent[bend], rewards[bend], "o", markersize=11, markerfacecolor="none", color=JUDGE, label="knee"
                )
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("mean reward of the winner")
    axes[0].legend(fontsize=7, frameon=False, loc="lower right")
    figure.suptitle(
        f"{result['policy']}, {result['prompts']} film-review openings, {result['max_tokens']} new tokens; "
        "band: 95 % interval of plain best-of-n over them",
        fontsize=10,
    )
    path = FIGURES / "cost.png"
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


FIGURE_OF_RESULT = {
    "quality": quality,
    "arithmetic": arithmetic,
    "improve": improve,
    "rl": rl,
    "stopping": stopping,
    "stopping_live": cost,
    "latency": latency,
}


def main() -> None:
    FIGURES.mkdir(exist_ok=True)
    for name, draw in FIGURE_OF_RESULT.items():
        file = RESULTS / f"{name}.json"
        if file.exists():
            print(f"wrote {draw(json.loads(file.read_text()))}")


if __name__ == "__main__":
    main()
