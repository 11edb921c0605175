"""What a step gains where drawing overlaps learning: `python -m benchmarks.overlap_speed`.

Short runs of PPO with the embedded models, in turn and overlapping by turns, with one engine and one scorer for all.
The first step of a run draws before it learns, and the last draws nothing ahead; only the steps between them count.
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

from benchmarks.account import PHASES, Step, spread, steps_of
from benchmarks.provenance import provenance
from reranker.models.device import pick_device
from reranker.models.shared_trunk import SharedTrunk
from server.config import Settings
from training.policy.finetune import RunOptions
from training.rl.backend import Actors, Start, server_settings, started_actors
from training.rl.config import PPOTraining
from training.rl.learner import Learner
from training.rl.prompts import read_prompts
from training.rl.train import train
from training.rl.update import optimiser_steps

SETTINGS = PPOTraining(batch_size=32)
SUBJECTS, VERBS = ("The film", "This movie", "The story", "The cast"), ("was", "is", "seemed", "turned out to be")
WAYS = {"in turn": False, "overlapping": True}
Round = Mapping[str, Sequence[Step]]
"""The steps that count of each way."""


def main(
    results: Annotated[Path, typer.Option(help="Where the figures go.")] = Path("benchmarks/results/rl_overlap.json"),
    rounds: Annotated[int, typer.Option(min=1, help="Runs each way, by turns.")] = 3,
    steps: Annotated[int, typer.Option(min=3, help="Steps of a run; the first and the last do not count.")] = 5,
    batch_size: Annotated[int, typer.Option(min=4, help="Completions a step.")] = SETTINGS.batch_size,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest completion.")] = SETTINGS.max_tokens,
) -> None:
    """Seconds of a step with drawing and learning in turn, and with one over the other."""
    settings = replace(SETTINGS, steps=steps, batch_size=batch_size, max_tokens=max_tokens)
    with tempfile.TemporaryDirectory() as root:
        measured = asyncio.run(by_turns(Path(root), settings, rounds))
    found = {
        "policy": settings.base_model,
        "reward_model": settings.reward_model.partition("=")[0],
        "completions": settings.batch_size,
        "completion_tokens": settings.max_tokens,
        "epochs": settings.epochs,
        **figures(measured),
        "device": pick_device("auto"),
        "provenance": provenance(),
    }
    results.write_text(json.dumps(found, indent=1) + "\n")
    typer.echo(json.dumps(found))


async def by_turns(root: Path, settings: PPOTraining, rounds: int, start: Start = started_actors) -> list[Round]:
    """The runs, in `root`."""
    prompts = root / "prompts.jsonl"
    openings = (f"{subject} {verb}" for subject, verb in itertools.product(SUBJECTS, VERBS))
    prompts.write_text("".join(json.dumps({"prompt": opening}) + "\n" for opening in openings))
    parts = read_prompts(prompts, None, holdout=0.0)
    first = Learner(settings, torch.device(pick_device("auto")), optimiser_steps=optimiser_steps(settings))
    engine = server_settings(settings, first.write_for_engine(root), bfloat16=first.computes_bfloat16)
    found: list[Round] = []
    async with start(engine, first.held_trunk) as actors:

        @asynccontextmanager
        async def running(_: Settings, __: SharedTrunk | None) -> AsyncIterator[Actors]:
            yield actors

        for number in range(rounds):
            of_round = {}
            for way, overlap in WAYS.items():
                out = root / f"{way} {number}"
                await train(parts, out, replace(settings, overlap=overlap), RunOptions(progress=False), running)
                of_round[way] = steps_of(out)[1:-1]
            found.append(of_round)
    return found


def figures(rounds: Sequence[Round]) -> dict[str, Any]:
    """Of each way its seconds a step and the means of what they went for; and how the ways compare, round by round."""
    ways = {}
    for way in WAYS:
        steps = [step for one in rounds for step in one[way]]
        means = {name: fmean(step[name] for step in steps) for name in (*PHASES, "mismatch", "importance")}
        ways[way] = {"step_s": spread([_seconds(step) for step in steps]), **means}
    in_turn, overlapping = ([median(map(_seconds, one[way])) for one in rounds] for way in WAYS)
    ratios = [one / other for one, other in zip(in_turn, overlapping, strict=True)]
    return {"ways": ways, "times_as_fast": spread(ratios)}


def _seconds(step: Step) -> float:
    return sum(step[name] for name in PHASES)


if __name__ == "__main__":
    typer.run(main)
