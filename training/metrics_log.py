"""The metrics of a training run: metrics.csv, the same values for TensorBoard, and metrics.png.

A run that resumes from a checkpoint keeps the rows up to its step and writes the later rows again, so the file of an
interrupted run ends equal to the file of an uninterrupted run.
"""

import csv
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch.utils.tensorboard import SummaryWriter
from transformers import TrainerCallback

MetricsRow = Mapping[str, float]

LOG_EVERY_STEPS = 10

TRAINER_COLUMNS = {"epoch": "epoch", "loss": "loss", "learning_rate": "learning_rate"}
"""What every trainer logs -> the column."""


class MetricsTable:
    """The rows of OUT/metrics.csv, one per step, written to TensorBoard too.

    With a name the file is OUT/NAME.csv, and TensorBoard has a run of that name.
    """

    def __init__(self, out: Path, columns: Iterable[str], *, name: str = "", after_step: int = 0) -> None:
        """Keeps the rows up to `after_step` of the interrupted run that this run resumes."""
        self.rows: list[dict[str, float]] = []
        self._path = out / f"{name or 'metrics'}.csv"
        self._columns = ("step", *columns)
        if after_step:
            self._keep_up_to(after_step)
        self._writer = SummaryWriter(out / "tensorboard" / name, purge_step=after_step + 1)

    def add(self, step: int, values: Mapping[str, float]) -> None:
        self.rows.append({"step": step, **values})
        with self._path.open("w", newline="") as file:
            writer = csv.DictWriter(file, self._columns)
            writer.writeheader()
            writer.writerows(self.rows)
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()

    def _keep_up_to(self, step: int) -> None:
        try:
            with self._path.open(newline="") as file:
                cells = list(csv.DictReader(file))
        except FileNotFoundError:
            return
        rows = ({name: float(value) for name, value in row.items() if value} for row in cells)
        self.rows = [row | {"step": int(row["step"])} for row in rows if row["step"] <= step]


class MetricsLog(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
    """Writes what the trainer logs every few steps, and what `validate` measures after every epoch.

    `metrics` are the columns beside step, epoch, loss and learning rate; they and the loss are plotted. `logged` maps
    names in the trainer's log to those of the columns that come from the trainer.
    """

    def __init__(
        self,
        out: Path,
        metrics: Iterable[str],
        validate: Callable[[], Mapping[str, float]] | None = None,
        *,
        logged: Mapping[str, str] | None = None,
    ) -> None:
        self._out = out
        self._metrics = tuple(metrics)
        self._validate = validate
        self._logged = TRAINER_COLUMNS | dict(logged or {})
        self._validated = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        columns = (*TRAINER_COLUMNS.values(), *self._metrics)
        self._table = MetricsTable(self._out, columns, after_step=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        values = {column: logs[name] for name, column in self._logged.items() if name in logs} if logs else {}
        if values.keys() - {"epoch"}:  # the trainer's last entry summarises the whole run
            self._table.add(state.global_step, values)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._validate:
            self._table.add(state.global_step, {"epoch": state.epoch, **self._validate()})
            self._validated = True

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._validate and not self._validated:  # the run was resumed after its last step
            self._validate()
        self._table.close()
        plot_metrics(self._table.rows, ("loss", *self._metrics), self._out / "metrics.png")


def plot_metrics(rows: Sequence[MetricsRow], metrics: Iterable[str] | Mapping[str, str], path: Path) -> None:
    """Plots each metric over steps in a panel of its own; a mapping gives the titles."""
    titles = metrics if isinstance(metrics, Mapping) else {name: name.replace("_", " ") for name in metrics}
    figure, panels = make_panels(1, len(titles))
    for axes, (name, title) in zip(panels, titles.items(), strict=True):
        draw_curve(axes, rows, "step", name)
        axes.set(title=title, xlabel="step")
    figure.savefig(path)


def make_panels(rows: int, columns: int) -> tuple[Figure, list[Axes]]:
    """A figure and its empty panels, row by row."""
    figure = Figure(figsize=(4 * columns, 3 * rows), dpi=110, layout="constrained")
    panels: list[Axes] = [*figure.subplots(rows, columns, squeeze=False).flat]
    for axes in panels:
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    return figure, panels


def draw_curve(axes: Axes, rows: Sequence[MetricsRow], x: str, y: str) -> None:
    """Plots column `y` over column `x`, for the rows that have both."""
    points = [(row[x], row[y]) for row in rows if x in row and y in row]
    axes.plot([point[0] for point in points], [point[1] for point in points], marker="." if len(points) < 20 else "")
