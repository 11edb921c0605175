"""Where a run's memory and time went, as a result to be cited: `python -m benchmarks.account RUN`.

RUN is what `nbest train ppo` or `reinforce` wrote. Memory is that of its memory.json and the largest peak of its
metrics.csv; the shares of time are of the seconds of all its steps together. Scoring goes on while other completions
are still being drawn, so its seconds lie within those of the rollout.
"""

import csv
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.provenance import provenance

PHASES = ("rollout_s", "learning_s", "sync_s")

Step = dict[str, float]
"""A row of metrics.csv."""


def main(
    run: Annotated[Path, typer.Argument(help="The directory of a run that has done a step or more.")],
    results: Annotated[Path, typer.Option(help="Where the figures go.")] = Path("benchmarks/results/rl_run.json"),
) -> None:
    """What a run held in memory, and where its time went."""
    found = account(json.loads((run / "memory.json").read_text()), steps_of(run)) | {"provenance": provenance()}
    results.write_text(json.dumps(found, indent=1) + "\n")
    typer.echo(json.dumps(found))


def steps_of(run: Path) -> list[Step]:
    """What a run wrote of its steps."""
    with (run / "metrics.csv").open(newline="") as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]


def spread(found: Sequence[float]) -> dict[str, float]:
    """Median and extremes of what was found in several rounds."""
    return {"median": statistics.median(found), "low": min(found), "high": max(found), "rounds": len(found)}


def account(memory: dict[str, Any], steps: list[Step]) -> dict[str, Any]:
    """Bytes by what they are for, and each phase's share of the seconds."""
    seconds = {name: sum(step[name] for step in steps) for name in (*PHASES, "reward_s")}
    whole_s = sum(seconds[name] for name in PHASES)
    return {
        "held_bytes": memory["held"],
        "peak_rss_bytes": max(memory["peak_rss"], *(round(step["peak_memory_mib"] * 2**20) for step in steps)),
        "engine_rss_bytes": memory["engine_rss"],
        "steps": len(steps),
        "seconds_a_step": whole_s / len(steps),
        "share_of_time": {name.removesuffix("_s"): value / whole_s for name, value in seconds.items()},
    }


if __name__ == "__main__":
    typer.run(main)
