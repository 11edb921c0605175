"""What a training run reports while it goes: metrics.csv, the same for TensorBoard, and metrics.png.

A run that goes on from a checkpoint keeps the lines up to there and writes the rest anew, so that the file of an
interrupted run ends as that of one that was not.
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

OF_EVERY_TRAINER = {"epoch": "epoch", "loss": "loss", "learning_rate": "learning_rate"}


class MetricsTable:
    """The lines of OUT/metrics.csv, each of a step, and the same for TensorBoard.

    With a name: of OUT/NAME.csv, and a run of that name in TensorBoard.
    """

    def __init__(self, out: Path, columns: Iterable[str], *, name: str = "", after_step: int = 0) -> None:
        """Keeps the lines of an earlier run up to `after_step`, from where this one goes on."""
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


def plot_metrics(rows: Sequence[MetricsRow], measures: Iterable[str] | Mapping[str, str], path: Path) -> None:
    """A panel for each measure, over steps; a mapping tells their titles."""
    titles = measures if isinstance(measures, Mapping) else {name: name.replace("_", " ") for name in measures}
    figure, panels = panels_of(1, len(titles))
    for axes, (name, title) in zip(panels, titles.items(), strict=True):
        draw_curve(axes, rows, "step", name)
        axes.set(title=title, xlabel="step")
    figure.savefig(path)


def panels_of(lines: int, columns: int) -> tuple[Figure, list[Axes]]:
    """A figure and its empty panels, line by line."""
    figure = Figure(figsize=(4 * columns, 3 * lines), dpi=110, layout="constrained")
    panels: list[Axes] = [*figure.subplots(lines, columns, squeeze=False).flat]
    for axes in panels:
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    return figure, panels


def draw_curve(axes: Axes, rows: Sequence[MetricsRow], x: str, y: str) -> None:
    """One column against another, where a row has both."""
    points = [(row[x], row[y]) for row in rows if x in row and y in row]
    axes.plot([one for one, _ in points], [other for _, other in points], marker="." if len(points) < 20 else "")
