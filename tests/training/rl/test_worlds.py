"""PPO, REINFORCE and RLOO reach what they should where it can be computed: policies whose every answer can be listed.

The policy is a tiny Llama with an adapter that learns through `train_rl`, as by `nbest train`, from samples alone, and
is to end at pi_ref * exp(r / beta) / Z. There the return of every answer, r - beta * log(pi / pi_ref), is the same
number, beta * log Z: the nearer REINFORCE comes, the less noise there is in its gradient. PPO whitens its advantages,
so their noise stays as loud as it was, and it is large batches and the decay of the learning rate that let it settle.
Batches that were drawn one step ago lead to the same place.
"""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest

from reranker.models.shared_trunk import SharedTrunk
from server.config import Settings
from tests.support.doubles import ScriptedScorer
from tests.support.enumerable import PROBLEMS, RewardedAnswers
from tests.support.torch_generator import TorchGenerator
from training.policy.finetune import RunOptions
from training.rl.backend import Actors
from training.rl.config import PPOTraining, ReinforceTraining
from training.rl.train import train_rl

REWARD = "reward=python:of_the_world.py:reward"
"""Never called: a double of the scorer knows the rewards. As a function's they are left on their own scale."""

METHODS: dict[str, Callable[..., PPOTraining | ReinforceTraining]] = {
    "ppo": partial(PPOTraining, epochs=2, minibatches=1),
    "reinforce": partial(ReinforceTraining, baseline="batch"),
    "rloo": partial(ReinforceTraining, baseline="rloo"),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("problem", "overlap"), [*((problem, False) for problem in PROBLEMS), ("bandit of 4 arms", True)]
)
def test_a_policy_ends_at_the_optimum_of_rlhf(problem: str, overlap: bool, method: str, tmp_path: Path) -> None:
    world = RewardedAnswers(tmp_path, PROBLEMS[problem])

    @asynccontextmanager
    async def start(engine: Settings, held: SharedTrunk | None) -> AsyncIterator[Actors]:
        yield Actors(TorchGenerator(world.base, engine.adapter), ScriptedScorer(world.rewards))

    settings = METHODS[method](**world.training, reward_model=REWARD, overlap=overlap)
    written = train_rl(world.prompts, tmp_path / "out", settings, RunOptions(progress=False), holdout=0.0, start=start)
    assert world.distance_to_optimum() > 0.15
    assert world.distance_to_optimum(written) < 0.03
