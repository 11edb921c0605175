"""`nbest train` with replicas on Ray, over doubles: it learns what it learns in one process."""

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
from tests.training.rl.test_train import QUIET, World, logged, save_prompts, settings_of
from training.cli import train_app
from training.errors import TrainingError
from training.rl.backend import on_ray
from training.rl.train import train_rl

pytestmark = pytest.mark.filterwarnings("ignore")  # Ray's own


@asynccontextmanager
async def torch_generator(settings: Settings, *, tempered_logprobs: bool) -> AsyncIterator[Generator]:
    """In a replica."""
    assert tempered_logprobs
    yield TorchGenerator(Path(settings.model), settings.adapter)


@asynccontextmanager
async def scripted_scorers(*_: Any) -> AsyncIterator[Mapping[str, Scorer]]:
    """In a replica."""
    yield {"reward": ScriptedScorer()}


@asynccontextmanager
async def cannot_start(settings: Settings, **_: Any) -> AsyncIterator[Generator]:
    if settings.model:
        raise RuntimeError("no such model")
    yield TorchGenerator(Path(settings.model))


@pytest.fixture(autouse=True)
def doubles_in_replicas(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two generators; and of this process not all children are Ray's: others are the engines of other tests."""
    monkeypatch.setattr(cluster, "kill_children", lambda: None)
    monkeypatch.setattr(factory, "started_generator", torch_generator)
    monkeypatch.setattr(factory, "started_scorers", scripted_scorers)
    monkeypatch.setenv("NBEST_GENERATOR_REPLICAS", "2")
    monkeypatch.setenv("NBEST_GENERATOR_CPUS", "0.5")


def test_two_replicas_draw_each_version_and_teach_what_one_generator_does(tmp_path: Path) -> None:
    """A replica that had not loaded a version would draw with another, which ends a run."""
    base, prompts = save_tiny_policy(tmp_path / "base"), save_prompts(tmp_path / "prompts.jsonl")
    settings, here, there = settings_of("reinforce", base, steps=3, overlap=True), tmp_path / "here", tmp_path / "there"
    expected = train_rl(prompts, here, settings, QUIET, start=World(base).start)
    found = train_rl(prompts, there, settings, QUIET, start=on_ray(None))
    assert (found / WEIGHTS).read_bytes() == (expected / WEIGHTS).read_bytes()
    assert logged(there, "reward") == logged(here, "reward")


def test_a_replica_that_does_not_come_up_ends_the_run_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, prompts = save_tiny_policy(tmp_path / "base"), save_prompts(tmp_path / "prompts.jsonl")
    monkeypatch.setattr(factory, "started_generator", cannot_start)
    with pytest.raises(TrainingError, match=r"does not start: .*generator: no such model"):
        train_rl(prompts, tmp_path / "out", settings_of("ppo", base), QUIET, start=on_ray(None))


def test_a_cluster_without_ray_is_a_mistake_that_is_told(tmp_path: Path) -> None:
    options = ["--prompts", str(tmp_path), "--out", str(tmp_path), "--ray-address", "10.0.0.5:6379"]
    result = CliRunner().invoke(train_app, ["ppo", *options])
    assert result.exit_code == 1
    assert "a Ray cluster is only used with --ray; add that, or leave --ray-address out" in result.output
