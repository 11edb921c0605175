"""Breakdown of an RL training run by memory and time: `python -m benchmarks.rl_breakdown RUN`.

RUN is the directory that `nbest train ppo` or `nbest train reinforce` wrote. Memory is read from its memory.json and
from the highest peak in its metrics.csv. Time is each phase's share of the seconds of all steps. Scoring overlaps with
sampling, so the seconds of scoring are part of the rollout's.
"""

import csv
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.provenance import provenance

PHASES = ("rollout_s", "learning_s", "sync_s")

Step = dict[str, float]
"""A row of metrics.csv."""


def main(
    run: Annotated[Path, typer.Argument(help="Directory of a training run with at least one step.")],
    results: Annotated[Path, typer.Option(help="Output file.")] = Path("benchmarks/results/rl_breakdown.json"),
) -> None:
    """Write the memory and time breakdown of a training run."""
    figures = breakdown(json.loads((run / "memory.json").read_text()), steps_of(run))
    result = figures | {"provenance": provenance()}
    results.write_text(json.dumps(result, indent=1) + "\n")
    typer.echo(json.dumps(result))


def steps_of(run: Path) -> list[Step]:
    """The rows of a run's metrics.csv, without empty columns."""
    with (run / "metrics.csv").open(newline="") as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]


def breakdown(memory: dict[str, Any], steps: list[Step]) -> dict[str, Any]:
    """Bytes by purpose, and each phase's share of the wall-clock."""
    seconds = {name: sum(step[name] for step in steps) for name in (*PHASES, "reward_s")}
    total_s = sum(seconds[name] for name in PHASES)
    return {
        "held_bytes": memory["held"],
        "peak_rss_bytes": max(memory["peak_rss"], *(round(step["peak_memory_mib"] * 2**20) for step in steps)),
        "engine_rss_bytes": memory["engine_rss"],
        "steps": len(steps),
        "seconds_a_step": total_s / len(steps),
        "share_of_time": {name.removesuffix("_s"): value / total_s for name, value in seconds.items()},
    }


if __name__ == "__main__":
    typer.run(main)
