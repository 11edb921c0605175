"""`nbest calibrate`: reads a run's directory, writes what was found beside it, and tells it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from server.offline.calibration import Target, as_toml, calibrate, pools_of
from server.offline.errors import OfflineError
from server.offline.journal import recover
from server.offline.plot import plot_calibration
from server.offline.records import Result
from server.offline.run_directory import RESULTS, SUMMARY, manifest, write_whole

FOUND, PLOT = "calibration.json", "calibration.png"


@dataclass(frozen=True, slots=True)
class Goal:
    """What a person asks for: exactly one of these."""

    quality: float | None = None
    tokens: float | None = None
    seconds: float | None = None

    def __str__(self) -> str:
        (told,) = (f"--{name} {value:g}" for name, value in self._given.items())
        return told

    @property
    def _given(self) -> dict[str, float]:
        named = {"quality": self.quality, "tokens": self.tokens, "seconds": self.seconds}
        return {name: value for name, value in named.items() if value is not None}

    def target(self, run: Path) -> Target:
        """In tokens where it is in seconds, by what the run drew in a second.

        Raises:
            OfflineError: there is not exactly one, or the run does not tell how fast it was.
        """
        if len(self._given) != 1:
            raise OfflineError("Give one of --quality, --tokens and --seconds, such as --quality 0.95")
        if self.seconds is None:
            return Target(self.quality, self.tokens)
        return Target(tokens=self.seconds * _tokens_per_s(run))


def _tokens_per_s(run: Path) -> float:
    try:
        this_run = json.loads((run / SUMMARY).read_text())["this_run"]
        speed = float(this_run["generated_tokens"] / this_run["seconds"])
    except (OSError, ValueError, KeyError, ZeroDivisionError) as error:
        raise OfflineError(f"{run / SUMMARY} does not tell how fast the run was; give --tokens instead") from error
    if not speed:  # all was there already when the run was begun again
        raise OfflineError(f"{run / SUMMARY} is of a run that had nothing left to draw; give --tokens instead")
    return speed


def calibrate_run(run: Path, goal: Goal, out: Path, console: Console) -> dict[str, Any]:
    """What is recommended for the goal; written to `run` and, as settings, to `out`.

    Raises:
        OfflineError: `run` is no output of nbest batch, holds too little, or nothing in it reaches the goal.
    """
    manifest(run)
    target = goal.target(run)
    pools = pools_of(recover(run / RESULTS, Result))
    try:
        found = calibrate(pools, target)
    except ValueError as error:
        raise OfflineError("All candidates of each prompt have the same reward, so nothing can be chosen") from error
    write_whole(run / FOUND, json.dumps(found, indent=1) + "\n")
    write_whole(out, as_toml(found, str(goal)))
    plot_calibration(found, run / PLOT)
    _tell(found, goal, out, console)
    return found


def _tell(found: dict[str, Any], goal: Goal, out: Path, console: Console) -> None:
    table = Table(title=f"{found['prompts']} prompts, pools of {found['pool']}; 95 % intervals over prompts")
    for heading in ("", "mean reward", "tokens a request"):
        table.add_column(heading, justify="right" if heading else "left")
    for one in found["plain"]:
        if one["best_of"] & (one["best_of"] - 1) == 0 or one["best_of"] == found["pool"]:  # powers of two, and all
            table.add_row(f"best of {one['best_of']}", _spread(one["reward"]), f"{one['tokens']:,.0f}")
    best = found["recommended"]
    server = best["server"]
    name = "adaptive stopping" if "default_stopping" in server else "plain"
    table.add_row(
        f"{goal}: {name}, best of up to {server['default_best_of']}",
        _spread(best["reward"]),
        f"{best['tokens']['mean']:,.0f} ({100 * best['share_of_all_tokens']:.0f} %)",
        style="bold",
    )
    console.print(table)
    console.print(f"Written to {out}; to serve it: nbest serve --config {out}", soft_wrap=True, highlight=False)


def _spread(interval: dict[str, float]) -> str:
    return f"{interval['mean']:.2f} ({interval['low']:.2f} … {interval['high']:.2f})"
