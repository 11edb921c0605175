"""Plots the evaluations of a run, over steps and against KL, the cost at which the reward was gained.

Bands are 95 % intervals over prompts. An evaluation is red in the panels of the metrics that raised an alarm.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes

from training.metrics_log import MetricsRow, draw_curve, make_panels
from training.rl.evaluation.reward_hacking import Alarm

INTERVAL = 1.96
"""Standard errors on either side of the mean: a 95 % interval."""
OTHER_METRICS = {
    "kl": "KL to the reference, nats a completion",
    "length": "length, tokens",
    "repetition": "repeated 4-grams, share",
    "perplexity": "perplexity under the reference",
}


def plot_evaluations(
    rows: Sequence[MetricsRow], alarms: Sequence[Alarm], scorers: Mapping[str, str], path: Path
) -> None:
    """`rows` are those of evaluations.csv; `scorers` are the names of the reward and, if there is one, the judge."""
    figure, panels = make_panels(2, len(scorers) + 2)
    titles = {metric: f"{metric} ({name})" for metric, name in scorers.items()}
    contents = [
        *(("step", metric, title) for metric, title in titles.items()),
        *(("kl", metric, f"{title} against KL") for metric, title in titles.items()),
        *(("step", metric, title) for metric, title in OTHER_METRICS.items()),
    ]
    for axes, (x, metric, title) in zip(panels, contents, strict=True):
        draw_curve(axes, rows, x, metric)
        if x == "step":
            _draw_band(axes, rows, metric)
        alarm_steps = {alarm.step for alarm in alarms if alarm.metric == metric}
        marked = [row for row in rows if row["step"] in alarm_steps]
        axes.plot([row[x] for row in marked], [row[metric] for row in marked], "o", color="tab:red", zorder=3)
        axes.set(title=title, xlabel=x if x == "step" else OTHER_METRICS["kl"])
    prompts = f"{rows[-1]['completions']:.0f} held-out prompts"
    figure.suptitle(f"{prompts}; bands: 95 % intervals, red: alarms", fontsize="medium")
    figure.savefig(path)


def _draw_band(axes: Axes, rows: Sequence[MetricsRow], metric: str) -> None:
    error = f"{metric}_standard_error"
    with_error = [row for row in rows if error in row]
    low, high = ([row[metric] + side * INTERVAL * row[error] for row in with_error] for side in (-1, 1))
    axes.fill_between([row["step"] for row in with_error], low, high, alpha=0.15, linewidth=0)
