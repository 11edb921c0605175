"""Seconds of a PPO step with sampling overlapping learning, against one after the other.

Short PPO runs with the embedded models alternate between the two ways (`in turn`, `overlapping`) on one engine and one
scorer. The first step of an overlapping run samples before it learns, and the last samples nothing ahead, so only the
steps between them are counted.

    python -m benchmarks.rl_overlap [--rounds 3] [--steps 5]
"""

import asyncio
import itertools
import json
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from statistics import fmean, median
from typing import Annotated, Any

import torch
import typer

from benchmarks.provenance import provenance
from benchmarks.rl_breakdown import PHASES, Step, steps_of
from benchmarks.stats import paired_ratio, spread
from reranker.models.device import pick_device
from reranker.models.shared_trunk import SharedTrunk
from server.config import Settings
from training.policy.config import RunOptions
from training.rl.backend import Backend, StartBackend, local_backend, server_settings
from training.rl.config import PPOTraining
from training.rl.learner import Learner
from training.rl.prompts import read_prompts
from training.rl.train import train
from training.rl.update import optimiser_steps

SETTINGS = PPOTraining(batch_size=32)
SUBJECTS, VERBS = ("The film", "This movie", "The story", "The cast"), ("was", "is", "seemed", "turned out to be")
WAYS = {"in turn": False, "overlapping": True}
Round = Mapping[str, Sequence[Step]]
"""Way -> the counted steps of one run."""


def main(
    results: Annotated[Path, typer.Option(help="Output file.")] = Path("benchmarks/results/rl_overlap.json"),
    rounds: Annotated[int, typer.Option(min=1, help="Runs of each way, alternating.")] = 3,
    steps: Annotated[int, typer.Option(min=3, help="Steps of a run; the first and the last are not counted.")] = 5,
    batch_size: Annotated[int, typer.Option(min=4, help="Completions in a step.")] = SETTINGS.batch_size,
    max_tokens: Annotated[int, typer.Option(min=1, help="Maximum tokens of a completion.")] = SETTINGS.max_tokens,
) -> None:
    """Measure the seconds of a PPO step with sampling and learning in turn, and overlapping."""
    settings = replace(SETTINGS, steps=steps, batch_size=batch_size, max_tokens=max_tokens)
    with tempfile.TemporaryDirectory() as root:
        measured = asyncio.run(alternating_runs(Path(root), settings, rounds))
    result = {
        "policy": settings.base_model,
        "reward_model": settings.reward_model.partition("=")[0],
        "completions": settings.batch_size,
        "completion_tokens": settings.max_tokens,
        "epochs": settings.epochs,
        **figures(measured),
        "device": pick_device("auto"),
        "provenance": provenance(),
    }
    results.write_text(json.dumps(result, indent=1) + "\n")
    typer.echo(json.dumps(result))


async def alternating_runs(
    root: Path, settings: PPOTraining, rounds: int, start: StartBackend = local_backend
) -> list[Round]:
    """Runs each way once in every round, on one engine; the runs are written to folders of `root`."""
    prompts = root / "prompts.jsonl"
    openings = (f"{subject} {verb}" for subject, verb in itertools.product(SUBJECTS, VERBS))
    prompts.write_text("".join(json.dumps({"prompt": opening}) + "\n" for opening in openings))
    parts = read_prompts(prompts, None, holdout=0.0)
    first = Learner(settings, torch.device(pick_device("auto")), optimiser_steps=optimiser_steps(settings))
    engine = server_settings(settings, first.write_for_engine(root), bfloat16=first.computes_bfloat16)
    measured: list[Round] = []
    async with start(engine, first.shared_trunk) as backend:

        @asynccontextmanager
        async def running(_: Settings, __: SharedTrunk | None) -> AsyncIterator[Backend]:
            yield backend

        for number in range(rounds):
            steps_by_way = {}
            for way, overlap in WAYS.items():
                out = root / f"{way} {number}"
                await train(parts, out, replace(settings, overlap=overlap), RunOptions(progress=False), running)
                steps_by_way[way] = steps_of(out)[1:-1]
            measured.append(steps_by_way)
    return measured


def figures(rounds: Sequence[Round]) -> dict[str, Any]:
    """For each way the seconds of a step and the means of its phases; and the ratio of the ways, round by round."""
    ways = {}
    for way in WAYS:
        steps = [step for steps_by_way in rounds for step in steps_by_way[way]]
        means = {name: fmean(step[name] for step in steps) for name in (*PHASES, "mismatch", "importance")}
        ways[way] = {"step_s": spread([_seconds(step) for step in steps]), **means}
    in_turn, overlapping = ([median(map(_seconds, steps_by_way[way])) for steps_by_way in rounds] for way in WAYS)
    return {"ways": ways, "times_as_fast": paired_ratio(in_turn, overlapping)}


def _seconds(step: Step) -> float:
    return sum(step[name] for name in PHASES)


if __name__ == "__main__":
    typer.run(main)
