"""`nbest train` with replicas on Ray, over test doubles: the result equals that of one process."""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from reranker.scorers.base import Scorer
from server import factory
from server.config import Settings
from server.distributed import cluster
from server.generation.base import Generator
from server.generation.weight_store import WEIGHTS
from tests.support.doubles import ScriptedScorer
from tests.support.tiny_models import save_tiny_policy
from tests.support.torch_generator import TorchGenerator
from tests.training.rl.test_train import QUIET, RecordedBackend, logged, save_prompts, settings_of
from training.cli import train_app
from training.errors import TrainingError
from training.rl.backend import ray_backend
from training.rl.train import train_rl

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore")]  # warnings of Ray


@asynccontextmanager
async def torch_generator(settings: Settings, *, tempered_logprobs: bool) -> AsyncIterator[Generator]:
    """Runs in a replica."""
    assert tempered_logprobs
    yield TorchGenerator(Path(settings.model), settings.adapter)


@asynccontextmanager
async def scripted_scorers(*_: Any) -> AsyncIterator[Mapping[str, Scorer]]:
    """Runs in a replica."""
    yield {"reward": ScriptedScorer()}


@asynccontextmanager
async def cannot_start(settings: Settings, **_: Any) -> AsyncIterator[Generator]:
    if settings.model:
        raise RuntimeError("no such model")
    yield TorchGenerator(Path(settings.model))


@pytest.fixture(autouse=True)
def doubles_in_replicas(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uses two generator replicas. Children of this process are not killed: some are engines of other tests."""
    monkeypatch.setattr(cluster, "kill_children", lambda: None)
    monkeypatch.setattr(factory, "started_generator", torch_generator)
    monkeypatch.setattr(factory, "started_scorers", scripted_scorers)
    monkeypatch.setenv("NBEST_GENERATOR_REPLICAS", "2")
    monkeypatch.setenv("NBEST_GENERATOR_CPUS", "0.5")


def test_two_replicas_sample_with_each_version_and_train_the_same_weights_as_one_generator(tmp_path: Path) -> None:
    """A replica that has not loaded a version would sample with another, which ends the run."""
    base, prompts = save_tiny_policy(tmp_path / "base"), save_prompts(tmp_path / "prompts.jsonl")
    settings = settings_of("reinforce", base, steps=3, overlap=True)
    local, on_ray = tmp_path / "local", tmp_path / "ray"
    expected = train_rl(prompts, local, settings, QUIET, start=RecordedBackend(base).start)
    written = train_rl(prompts, on_ray, settings, QUIET, start=ray_backend(None))
    assert (written / WEIGHTS).read_bytes() == (expected / WEIGHTS).read_bytes()
    assert logged(on_ray, "reward") == logged(local, "reward")


def test_a_replica_that_does_not_start_ends_the_run_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, prompts = save_tiny_policy(tmp_path / "base"), save_prompts(tmp_path / "prompts.jsonl")
    monkeypatch.setattr(factory, "started_generator", cannot_start)
    with pytest.raises(TrainingError, match=r"does not start: .*generator: no such model"):
        train_rl(prompts, tmp_path / "out", settings_of("ppo", base), QUIET, start=ray_backend(None))


def test_a_ray_address_without_ray_is_refused(tmp_path: Path) -> None:
    options = ["--prompts", str(tmp_path), "--out", str(tmp_path), "--ray-address", "10.0.0.5:6379"]
    result = CliRunner().invoke(train_app, ["ppo", *options])
    assert result.exit_code == 1
    assert "a Ray cluster is only used with --ray; add that, or leave --ray-address out" in result.output
