"""What is kept of the evaluations of a run, in OUT.

    evaluations.csv             a line of figures for each, and the same for TensorBoard
    evaluations.png             the same as curves
    evaluations/step-K.jsonl    the samples
    alarms.jsonl                the alarms (`training.rl.evaluation.reward_hacking`)

A run that goes on from a checkpoint keeps what was there up to its step and writes the rest anew.
"""

import json
from dataclasses import asdict
from pathlib import Path

from training.metrics_log import MetricsTable
from training.rl.evaluation.measures import Evaluation
from training.rl.evaluation.plot import plot_evaluations
from training.rl.evaluation.reward_hacking import Alarm, alarms

COLUMNS = (
    *("completions", "reward", "reward_standard_error", "judge", "judge_standard_error"),
    *("kl", "kl_standard_error", "length", "cut", "repetition", "perplexity", "alarms"),
)


class EvaluationLog:
    """The evaluations of a run, from its first step on; `judge` is the judge's name, if there is one."""

    def __init__(self, out: Path, reward: str, judge: str | None, *, after_step: int) -> None:
        """Keeps those of an earlier run up to `after_step`, from where this one goes on; at 0 it begins anew."""
        self._out = out
        self._names = {"reward": reward} | ({"judge": judge} if judge else {})
        columns = [column for column in COLUMNS if judge or not column.startswith("judge")]
        self._table = MetricsTable(out, columns, name="evaluations", after_step=after_step)
        self._evaluations: list[Evaluation] = []
        self._alarms: list[Alarm] = []
        self._samples = out / "evaluations"
        self._samples.mkdir(parents=True, exist_ok=True)
        found = {int(path.stem.partition("-")[2]): path for path in self._samples.glob("step-*.jsonl")}
        for step, path in sorted(found.items()):
            if after_step and step <= after_step:
                self._remember(Evaluation.of_lines(step, path.read_text()))
            else:
                path.unlink()

    def samples_of(self, step: int) -> Path:
        return self._samples / f"step-{step}.jsonl"

    def add(self, evaluation: Evaluation) -> list[Alarm]:
        """Writes down all that is made of it; the alarms it raises."""
        self.samples_of(evaluation.step).write_text(evaluation.lines())
        raised = self._remember(evaluation)
        (self._out / "alarms.jsonl").write_text("".join(json.dumps(asdict(one)) + "\n" for one in self._alarms))
        self._table.add(evaluation.step, evaluation.figures() | {"alarms": float(len(raised))})
        plot_evaluations(self._table.rows, self._alarms, self._names, self._out / "evaluations.png")
        return raised

    def close(self) -> None:
        self._table.close()

    def _remember(self, evaluation: Evaluation) -> list[Alarm]:
        self._evaluations.append(evaluation)
        raised = alarms(self._evaluations)
        self._alarms += raised
        return raised
