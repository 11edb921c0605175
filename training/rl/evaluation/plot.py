"""The evaluations of a run as curves, over steps and against KL, which is what the reward was paid with.

Bands are 95 % intervals over prompts. Red are evaluations with an alarm about what the panel shows.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes

from training.metrics_log import MetricsRow, draw_curve, panels_of
from training.rl.evaluation.reward_hacking import Alarm

INTERVAL = 1.96
"""Standard errors either way."""
OTHERS = {
    "kl": "KL to the reference, nats a completion",
    "length": "length, tokens",
    "repetition": "repeated 4-grams, share",
    "perplexity": "perplexity under the reference",
}


def plot_evaluations(
    rows: Sequence[MetricsRow], alarms: Sequence[Alarm], scorers: Mapping[str, str], path: Path
) -> None:
    """`rows` are those of evaluations.csv; `scorers` are the names of the reward and, if there is one, the judge."""
    figure, panels = panels_of(2, len(scorers) + 2)
    scored = {measure: f"{measure} ({name})" for measure, name in scorers.items()}
    wanted = [
        *(("step", measure, title) for measure, title in scored.items()),
        *(("kl", measure, f"{title} against KL") for measure, title in scored.items()),
        *(("step", measure, title) for measure, title in OTHERS.items()),
    ]
    for axes, (x, measure, title) in zip(panels, wanted, strict=True):
        draw_curve(axes, rows, x, measure)
        if x == "step":
            _draw_band(axes, rows, measure)
        alarming = {alarm.step for alarm in alarms if alarm.measure == measure}
        marked = [row for row in rows if row["step"] in alarming]
        axes.plot([row[x] for row in marked], [row[measure] for row in marked], "o", color="tab:red", zorder=3)
        axes.set(title=title, xlabel=x if x == "step" else OTHERS["kl"])
    prompts = f"{rows[-1]['completions']:.0f} held-out prompts"
    figure.suptitle(f"{prompts}; bands: 95 % intervals, red: alarms", fontsize="medium")
    figure.savefig(path)


def _draw_band(axes: Axes, rows: Sequence[MetricsRow], measure: str) -> None:
    error = f"{measure}_standard_error"
    known = [row for row in rows if error in row]
    low, high = ([row[measure] + side * INTERVAL * row[error] for row in known] for side in (-1, 1))
    axes.fill_between([row["step"] for row in known], low, high, alpha=0.15, linewidth=0)
