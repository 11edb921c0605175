"""`nbest calibrate`: reads a run's directory, writes the calibration and the recommended settings, and prints them."""

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from server.offline.calibration import Target, as_toml, calibrate, pools_of
from server.offline.errors import OfflineError
from server.offline.journal import recover
from server.offline.plot import plot_calibration
from server.offline.records import Result
from server.offline.run_directory import RESULTS, SUMMARY, manifest, write_text

CALIBRATION, PLOT = "calibration.json", "calibration.png"


def calibrate_run(
    run: Path,
    out: Path,
    console: Console,
    *,
    quality: float | None = None,
    tokens: float | None = None,
    seconds: float | None = None,
) -> dict[str, Any]:
    """Writes the calibration to the directory `run` and the recommended settings to the file `out`.

    Exactly one of `quality`, `tokens` and `seconds` is given. Seconds become tokens at the speed of the run.

    Raises:
        OfflineError: `run` is no output of nbest batch, it holds too few candidates, or no setting reaches the target.
    """
    manifest(run)
    options = {"quality": quality, "tokens": tokens, "seconds": seconds}
    given = [f"--{name} {value:g}" for name, value in options.items() if value is not None]
    if len(given) != 1:
        raise OfflineError("Give one of --quality, --tokens and --seconds, such as --quality 0.95")
    target = Target(quality, tokens if seconds is None else seconds * _tokens_per_s(run))
    pools = pools_of(recover(run / RESULTS, Result))
    try:
        calibration = calibrate(pools, target)
    except ValueError as error:
        raise OfflineError("All candidates of each prompt have the same reward, so nothing can be chosen") from error
    write_text(run / CALIBRATION, json.dumps(calibration, indent=1) + "\n")
    write_text(out, as_toml(calibration, given[0]))
    plot_calibration(calibration, run / PLOT)
    _print_calibration(calibration, given[0], out, console)
    return calibration


def _tokens_per_s(run: Path) -> float:
    """The speed of the run, from its summary."""
    try:
        this_run = json.loads((run / SUMMARY).read_text())["this_run"]
        speed = float(this_run["generated_tokens"] / this_run["seconds"])
    except (OSError, ValueError, KeyError, ZeroDivisionError) as error:
        raise OfflineError(f"{run / SUMMARY} does not say how fast the run was; give --tokens instead") from error
    if not speed:  # the command was run again after the last line was done
        raise OfflineError(f"{run / SUMMARY} is of a run that had no lines left; give --tokens instead")
    return speed


def _print_calibration(calibration: dict[str, Any], option: str, out: Path, console: Console) -> None:
    pool = calibration["pool"]
    table = Table(title=f"{calibration['prompts']} prompts, pools of {pool}; 95 % intervals over prompts")
    for heading in ("", "mean reward", "tokens per request"):
        table.add_column(heading, justify="right" if heading else "left")
    for setting in calibration["plain"]:
        n = setting["best_of"]
        if n & (n - 1) == 0 or n == pool:  # powers of two, and the whole pool
            table.add_row(f"best of {n}", _interval(setting["reward"]), f"{setting['tokens']:,.0f}")
    best = calibration["recommended"]
    server = best["server"]
    policy = "adaptive stopping" if "default_stopping" in server else "plain"
    table.add_row(
        f"{option}: {policy}, best of up to {server['default_best_of']}",
        _interval(best["reward"]),
        f"{best['tokens']['mean']:,.0f} ({100 * best['share_of_all_tokens']:.0f} %)",
        style="bold",
    )
    console.print(table)
    console.print(f"Written to {out}; to serve it: nbest serve --config {out}", soft_wrap=True, highlight=False)


def _interval(interval: dict[str, float]) -> str:
    return f"{interval['mean']:.2f} ({interval['low']:.2f} … {interval['high']:.2f})"
