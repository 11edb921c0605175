"""Writes the evaluation of a reward model: all figures to evaluation.json, the plots to evaluation.png."""

import json
from dataclasses import asdict
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from training.reward.evaluate import RewardEvaluation


def write_report(evaluation: RewardEvaluation, out: Path, *, reward_model: str, data: str, min_gap: float) -> None:
    """Writes both files into the directory `out`, which is created if it is missing."""
    out.mkdir(parents=True, exist_ok=True)
    figures = {"reward_model": reward_model, "data": data, "min_gap": min_gap} | asdict(evaluation)
    (out / "evaluation.json").write_text(json.dumps(figures, indent=2) + "\n")
    figure = Figure(figsize=(10, 4), layout="constrained")
    reliability, accuracy = figure.subplots(1, 2)
    _plot_reliability(reliability, evaluation)
    _plot_accuracy(accuracy, evaluation)
    figure.savefig(out / "evaluation.png")


def _plot_reliability(axes: Axes, evaluation: RewardEvaluation) -> None:
    axes.plot([0.5, 1.0], [0.5, 1.0], color="grey", linestyle="--", label="perfect calibration")
    axes.plot(
        [point.predicted for point in evaluation.reliability],
        [point.won for point in evaluation.reliability],
        marker="o",
        label=f"log loss {evaluation.log_loss:.3f}, calibration error {evaluation.calibration_error:.3f}",
    )
    axes.set(xlabel="predicted probability that the favourite wins", ylabel="share of wins", title="reliability")
    axes.legend()


def _plot_accuracy(axes: Axes, evaluation: RewardEvaluation) -> None:
    shown = {"overall": evaluation.overall, "length alone": evaluation.length_alone}
    if len(evaluation.by_gap) > 1:
        shown |= {f"gap {name}": accuracy for name, accuracy in evaluation.by_gap.items()}
    measured = {name: (accuracy.accuracy, accuracy.low, accuracy.high) for name, accuracy in shown.items()}
    measured |= {
        f"best of n, {name}": (accuracy.accuracy, accuracy.low, accuracy.high)
        for name, accuracy in evaluation.best_of_n.items()
    }
    for y, (accuracy, low, high) in enumerate(measured.values()):
        axes.plot([low, high], [y, y], color="tab:blue")
        axes.plot([accuracy], [y], color="tab:blue", marker="o")
    axes.set_yticks(range(len(measured)), list(measured))
    axes.invert_yaxis()
    axes.set(xlim=(0, 1), xlabel="accuracy with 95% interval", title="right order")
