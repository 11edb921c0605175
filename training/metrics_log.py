"""What a training run reports while it goes: metrics.csv, the same for TensorBoard, and metrics.png at its end.

A run that goes on from a checkpoint keeps the lines up to there and writes the rest anew, so that the file of an
interrupted run ends as that of one that was not.
"""

import csv
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from torch.utils.tensorboard import SummaryWriter
from transformers import TrainerCallback

LOG_EVERY_STEPS = 10

OF_EVERY_TRAINER = {"epoch": "epoch", "loss": "loss", "learning_rate": "learning_rate"}


class MetricsTable:
    """The lines of OUT/metrics.csv, each of a step, and the same for TensorBoard."""

    def __init__(self, out: Path, columns: Iterable[str], *, after_step: int = 0) -> None:
        """Keeps the lines of an earlier run up to `after_step`, from where this one goes on."""
        self.rows: list[dict[str, float]] = []
        self._out = out
        self._columns = ("step", *columns)
        if after_step:
            self._keep_up_to(after_step)
        self._writer = SummaryWriter(out / "tensorboard", purge_step=after_step + 1)

    def add(self, step: int, values: Mapping[str, float]) -> None:
        self.rows.append({"step": step, **values})
        with (self._out / "metrics.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, self._columns)
            writer.writeheader()
            writer.writerows(self.rows)
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()

    def _keep_up_to(self, step: int) -> None:
        try:
            with (self._out / "metrics.csv").open(newline="") as file:
                lines = list(csv.DictReader(file))
        except FileNotFoundError:
            return
        values = ({name: float(value) for name, value in line.items() if value} for line in lines)
        self.rows = [row | {"step": int(row["step"])} for row in values if row["step"] <= step]


class MetricsLog(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
    """Writes what the trainer logs every few steps, and what `validate` measures after every epoch.

    `measures` are the columns beside step, epoch, loss and learning rate, those worth a picture. Those that `logged`
    names (the trainer's name -> the column) come from the trainer.
    """

    def __init__(
        self,
        out: Path,
        measures: Iterable[str],
        validate: Callable[[], Mapping[str, float]] | None = None,
        *,
        logged: Mapping[str, str] | None = None,
    ) -> None:
        self._out = out
        self._measures = tuple(measures)
        self._validate = validate
        self._logged = OF_EVERY_TRAINER | dict(logged or {})
        self._validated = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        columns = (*OF_EVERY_TRAINER.values(), *self._measures)
        self._table = MetricsTable(self._out, columns, after_step=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        values = {column: logs[name] for name, column in self._logged.items() if name in logs} if logs else {}
        if values.keys() - {"epoch"}:  # the trainer's last line is about the whole run
            self._table.add(state.global_step, values)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._validate:
            self._table.add(state.global_step, {"epoch": state.epoch, **self._validate()})
            self._validated = True

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._validate and not self._validated:  # resumed after the last step
            self._validate()
        self._table.close()
        plot_metrics(self._table.rows, ("loss", *self._measures), self._out / "metrics.png")


def plot_metrics(rows: list[dict[str, float]], measures: tuple[str, ...], path: Path) -> None:
    """A panel for each measure, over steps."""
    figure = Figure(figsize=(4 * len(measures), 3), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(measures)), measures, strict=True):
        points = [(row["step"], row[name]) for row in rows if name in row]
        axes.plot([step for step, _ in points], [value for _, value in points], marker="." if len(points) < 20 else "")
        axes.set_xlabel("step")
        axes.set_title(name.replace("_", " "))
    figure.savefig(path)
