"""What a training run reports while it goes: metrics.csv, the same for TensorBoard, and metrics.png at its end.

A run that goes on from a checkpoint keeps the lines up to there and writes the rest anew, so that the file of an
interrupted run ends as that of one that was not.
"""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from torch.utils.tensorboard import SummaryWriter
from transformers import TrainerCallback

from training.pair_accuracy import PairAccuracy

LOG_EVERY_STEPS = 10


class MetricsLog(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
    """Writes the loss every few steps, and what `validate` measures after every epoch."""

    columns = ("step", "epoch", "loss", "learning_rate", "validation_pair_accuracy")

    def __init__(self, out: Path, validate: Callable[[], PairAccuracy] | None) -> None:
        self.last_validation: PairAccuracy | None = None
        self._out = out
        self._validate = validate
        self._rows: list[dict[str, float]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._rows = self._read_up_to(state.global_step) if state.global_step else []
        self._writer = SummaryWriter(self._out / "tensorboard", purge_step=state.global_step + 1)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if logs and "loss" in logs:
            self._add(state.global_step, {name: logs[name] for name in ("epoch", "loss", "learning_rate")})

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._validate:
            self.last_validation = self._validate()
            self._add(
                state.global_step,
                {"epoch": state.epoch, "validation_pair_accuracy": self.last_validation.accuracy},
            )

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._validate and self.last_validation is None:  # resumed after the last step
            self.last_validation = self._validate()
        self._writer.close()
        plot_metrics(self._rows, self._out / "metrics.png")

    def _add(self, step: int, values: dict[str, float]) -> None:
        self._rows.append({"step": step} | values)
        with (self._out / "metrics.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, self.columns)
            writer.writeheader()
            writer.writerows(self._rows)
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def _read_up_to(self, step: int) -> list[dict[str, float]]:
        try:
            with (self._out / "metrics.csv").open(newline="") as file:
                lines = list(csv.DictReader(file))
        except FileNotFoundError:
            return []
        values = ({name: float(value) for name, value in line.items() if value} for line in lines)
        return [row | {"step": int(row["step"])} for row in values if row["step"] <= step]


def plot_metrics(rows: list[dict[str, float]], path: Path) -> None:
    """Loss and validation pair accuracy over steps."""
    figure = Figure(figsize=(8, 3), layout="constrained")
    for axes, name in zip(figure.subplots(1, 2), ("loss", "validation_pair_accuracy"), strict=True):
        points = [(row["step"], row[name]) for row in rows if name in row]
        axes.plot([step for step, _ in points], [value for _, value in points], marker="." if len(points) < 20 else "")
        axes.set_xlabel("step")
        axes.set_title(name.replace("_", " "))
    figure.savefig(path)
