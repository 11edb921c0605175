"""The files of a run's evaluations, in OUT.

    evaluations.csv             a row of metrics for each evaluation, written to TensorBoard too
    evaluations.png             the same metrics as curves
    evaluations/step-K.jsonl    the samples of the evaluation at step K
    alarms.jsonl                the alarms (`training.rl.evaluation.reward_hacking`)

A run that resumes from a checkpoint keeps the evaluations up to its step and makes the later ones again.
"""

import json
from dataclasses import asdict
from pathlib import Path

from training.metrics_log import MetricsTable
from training.rl.evaluation.metrics import Evaluation
from training.rl.evaluation.plot import plot_evaluations
from training.rl.evaluation.reward_hacking import Alarm, alarms

COLUMNS = (
    *("completions", "reward", "reward_standard_error", "judge", "judge_standard_error"),
    *("kl", "kl_standard_error", "length", "cut", "repetition", "perplexity", "alarms"),
)


class EvaluationLog:
    """Writes the evaluations of a run; `reward` and `judge` are the names of the scorers."""

    def __init__(self, out: Path, reward: str, judge: str | None, *, after_step: int) -> None:
        """Keeps the evaluations of the interrupted run up to `after_step`; with 0 it starts anew."""
        self._out = out
        self._names = {"reward": reward} | ({"judge": judge} if judge else {})
        columns = [column for column in COLUMNS if judge or not column.startswith("judge")]
        self._table = MetricsTable(out, columns, name="evaluations", after_step=after_step)
        self._evaluations: list[Evaluation] = []
        self._alarms: list[Alarm] = []
        self._samples = out / "evaluations"
        self._samples.mkdir(parents=True, exist_ok=True)
        paths = {int(path.stem.partition("-")[2]): path for path in self._samples.glob("step-*.jsonl")}
        for step, path in sorted(paths.items()):
            if after_step and step <= after_step:
                self._append(Evaluation.of_lines(step, path.read_text()))
            else:
                path.unlink()

    def samples_path(self, step: int) -> Path:
        """The file of the samples at that step."""
        return self._samples / f"step-{step}.jsonl"

    def add(self, evaluation: Evaluation) -> list[Alarm]:
        """Writes an evaluation to all files; returns the alarms that it raises."""
        self.samples_path(evaluation.step).write_text(evaluation.lines())
        raised = self._append(evaluation)
        (self._out / "alarms.jsonl").write_text("".join(json.dumps(asdict(alarm)) + "\n" for alarm in self._alarms))
        self._table.add(evaluation.step, evaluation.metrics() | {"alarms": float(len(raised))})
        plot_evaluations(self._table.rows, self._alarms, self._names, self._out / "evaluations.png")
        return raised

    def close(self) -> None:
        self._table.close()

    def _append(self, evaluation: Evaluation) -> list[Alarm]:
        self._evaluations.append(evaluation)
        raised = alarms(self._evaluations)
        self._alarms += raised
        return raised
