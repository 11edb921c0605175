"""Training with the real engine reaches the computed optimum; a weight sync that is broken on purpose is detected."""

import json
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import torch

from server.generation.base import SamplingParams
from server.generation.weight_store import CONFIG, WEIGHTS, Adapter
from tests.end_to_end.served import START_TIMEOUT_S, engine_behind
from tests.support.enumerable import PROBLEMS, RewardedAnswers
from tests.support.tiny_models import ENGINE_HEAD_DIM, draw_weights, save_tiny_policy
from training.policy.config import RunOptions
from training.rl.backend import Backend, local_backend, server_settings
from training.rl.config import ReinforceTraining
from training.rl.learner import Learner
from training.rl.prompts import read_prompts, tokenise_prompts
from training.rl.train import train_rl
from training.rl.weight_sync import Probe, SyncError, SyncResult, WeightSync

pytestmark = [pytest.mark.engine, pytest.mark.timeout(START_TIMEOUT_S + 300)]

ROUNDING_ERROR = 1e-4
"""Nats per token: engine and learner both compute in float32."""
LONG_PROMPT = "The film was a delight from start to finish and the cast was great. " * 3
"""Longer than a block of the engine's cache, so that a stale block would be used."""

module_loop = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture(scope="module", autouse=True)
def small_engine() -> Iterator[None]:
    """A training run reads its engine's settings from the environment."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NBEST_KV_CACHE_GIB", "0.25")
        patch.setenv("NBEST_MAX_NUM_SEQS", "256")
        yield


@pytest.mark.parametrize("problem", PROBLEMS)
def test_rloo_through_the_engine_ends_at_the_optimum_of_rlhf(problem: str, tmp_path: Path) -> None:
    """As in `tests/training/rl/test_optimum.py`, with a new adapter in the engine after every step."""
    world = RewardedAnswers(tmp_path, PROBLEMS[problem])
    reward = f"reward={world.save_reward_function(tmp_path / 'reward.py')}"
    settings = ReinforceTraining(**world.training, reward_model=reward)
    written = train_rl(world.prompts, tmp_path / "out", settings, RunOptions(progress=False), holdout=0.0)
    assert world.distance_to_optimum() > 0.15
    assert world.distance_to_optimum(written) < 0.03


AddAdapter = Callable[[str, int, str], Awaitable[Any]]


class SyncSetup:
    """A learner, and the engine to which its weights are synced."""

    def __init__(self, backend: Backend, learner: Learner, sync: WeightSync) -> None:
        self.learner = learner
        self.sync = sync
        self.adapters = engine_behind(backend.generator).adapters
        self._versions = 0

    def change_weights(self) -> None:
        """Gives the learner weights that it has not had before."""
        self._versions += 1
        draw_weights(self.learner.model, self._versions)

    @property
    def loaded(self) -> Adapter:
        assert self.adapters._current is not None
        return self.adapters._current.adapter


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def setup(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[SyncSetup]:
    root = tmp_path_factory.mktemp("sync")
    (root / "prompts.jsonl").write_text(json.dumps({"prompt": LONG_PROMPT}) + "\n")
    settings = ReinforceTraining(
        base_model=str(save_tiny_policy(root / "base", head_dim=ENGINE_HEAD_DIM)),
        dtype="float32",
        reward_model="r=logprob",
    )
    learner = Learner(settings, torch.device("cpu"), optimiser_steps=1)
    async with local_backend(server_settings(settings, learner.write_for_engine(root)), None) as backend:
        rows = read_prompts(root / "prompts.jsonl", None, holdout=0.0).train
        (prompt,) = tokenise_prompts(rows, root / "prompts.jsonl", learner.tokenizer, learner.max_length, max_tokens=16)
        probe = Probe(prompt, SamplingParams(max_tokens=16, seed=0, logprobs=0))
        yield SyncSetup(backend, learner, WeightSync(backend.generator, learner, root, probe, None))


async def stale_adapter(add: AddAdapter, previous: Adapter, name: str, number: int, path: str) -> Any:
    """Loads the previous adapter under the name of the new version."""
    return await add(name, number, str(previous.path))


async def wrong_scale(add: AddAdapter, previous: Adapter, name: str, number: int, path: str) -> Any:
    """Loads the right weights at twice their scale."""
    config = Path(path) / CONFIG
    fields = json.loads(config.read_text())
    config.write_text(json.dumps(fields | {"lora_alpha": 2 * fields["lora_alpha"]}))
    return await add(name, number, path)


async def stale_prefix(add: AddAdapter, previous: Adapter, name: str, number: int, path: str) -> Any:
    """Loads the new weights under the previous name, so that the engine uses the previous version's cached blocks."""
    for file in (CONFIG, WEIGHTS):
        shutil.copyfile(Path(path) / file, previous.path / file)
    return await add(previous.version, number, str(previous.path))


@module_loop
@pytest.mark.parametrize("fault", [stale_adapter, wrong_scale, stale_prefix])
async def test_a_broken_sync_is_an_error_with_both_log_probabilities(
    fault: Callable[..., Awaitable[Any]], setup: SyncSetup, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def synced() -> SyncResult:
        setup.change_weights()
        return await setup.sync()

    assert (await synced()).difference < ROUNDING_ERROR
    engine = setup.adapters._engine
    monkeypatch.setattr(engine, "add", partial(fault, engine.add, setup.loaded))
    with pytest.raises(SyncError, match=r"has -?\d+\.\d{4} nats a token by the engine and -?\d+\.\d{4} by the learner"):
        await synced()
    monkeypatch.undo()
    assert (await synced()).difference < ROUNDING_ERROR
