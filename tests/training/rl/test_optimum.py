"""PPO, REINFORCE and RLOO reach their optimum where it can be computed: for policies with a list of all answers.

The policy is a tiny Llama. Its adapter is trained by `train_rl`, as by `nbest train`, from samples alone. The optimum
is pi_ref * exp(r / beta) / Z. At the optimum the return of every answer, r - beta * log(pi / pi_ref), is the same
number, beta * log Z: the nearer REINFORCE comes, the less noise its gradient has. PPO whitens its advantages, so their
noise does not shrink; it converges by large batches and the decay of the learning rate. Batches that were sampled one
step earlier lead to the same optimum.
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
from training.policy.config import RunOptions
from training.rl.backend import Backend
from training.rl.config import PPOTraining, ReinforceTraining
from training.rl.train import train_rl

pytestmark = pytest.mark.slow

REWARD = "reward=python:rewards.py:reward"
"""Never called, since a test double of the scorer returns the rewards. The rewards of a function are not scaled."""

METHODS: dict[str, Callable[..., PPOTraining | ReinforceTraining]] = {
    "ppo": partial(PPOTraining, epochs=2, minibatches=1),
    "reinforce": partial(ReinforceTraining, baseline="batch"),
    "rloo": partial(ReinforceTraining, baseline="rloo"),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("problem", "overlap"), [*((problem, False) for problem in PROBLEMS), ("bandit of 4 arms", True)]
)
def test_training_ends_at_the_optimum_of_rlhf(problem: str, overlap: bool, method: str, tmp_path: Path) -> None:
    task = RewardedAnswers(tmp_path, PROBLEMS[problem])

    @asynccontextmanager
    async def start(engine: Settings, shared_trunk: SharedTrunk | None) -> AsyncIterator[Backend]:
        yield Backend(TorchGenerator(task.base, engine.adapter), ScriptedScorer(task.rewards))

    settings = METHODS[method](**task.training, reward_model=REWARD, overlap=overlap)
    written = train_rl(task.prompts, tmp_path / "out", settings, RunOptions(progress=False), holdout=0.0, start=start)
    assert task.distance_to_optimum() > 0.15
    assert task.distance_to_optimum(written) < 0.03
