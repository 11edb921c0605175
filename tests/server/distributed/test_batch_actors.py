"""`nbest batch --ray` with scripted doubles gives the same results as without Ray, also when workers die."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from reranker.candidate import Prompt
from server import factory, launch
from server.distributed import cluster
from server.generation.base import SamplingParams
from server.launch import StartError
from server.offline import batch
from server.offline.batch import BatchOptions
from server.pipeline.best_of_n import BestOfN
from tests.support.doubles import ScriptedGeneration
from tests.support.offline_runs import QUIET, SETTINGS, SeededGenerator, records, run, scripted, write_lines

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore")]  # warnings of Ray
ON_RAY = SETTINGS.model_copy(update={"ray": True, "generator_replicas": "2", "generator_cpus": 0.5})
LINES = 60


class CrashOnceGenerator(SeededGenerator):
    """Ends its process at each of these prompts, the first time only: a file in `crashes` marks that it happened."""

    def __init__(self, crashes: Path, *prompts: str) -> None:
        super().__init__(delay_s=0.002)
        self._crashes = crashes
        self._prompts = prompts

    def generate(
        self, prompt: Prompt, sampling: SamplingParams, n: int, *, stream_partial: bool = False
    ) -> ScriptedGeneration:
        marker = self._crashes / (prompt.text or "")
        if prompt.text in self._prompts and not marker.exists():
            marker.touch()
            os._exit(1)
        return super().generate(prompt, sampling, n, stream_partial=stream_partial)


@asynccontextmanager
async def failing_start(settings: Any, *_: Any) -> AsyncIterator[BestOfN]:
    if settings.model:
        raise RuntimeError("no such model")
    yield BestOfN(SeededGenerator(), {})


@pytest.fixture
def source(tmp_path: Path) -> Path:
    lines: list[Any] = [{"prompt": f"p{line}"} for line in range(1, LINES + 1)]
    return write_lines(tmp_path / "in.jsonl", [*lines, "not json\n", {"prompt": "last", "best_of": 3}])


@pytest.fixture
def kept_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command kills all children of its process; here some are the engines of other tests, so it must not."""
    for module in (cluster, launch):
        monkeypatch.setattr(module, "kill_children", lambda: None)


@pytest.mark.usefixtures("kept_processes")
def test_dying_workers_lose_no_line_and_change_no_result(source: Path, tmp_path: Path) -> None:
    """Two lines each crash the worker that runs them first; run again, the same command has nothing left to do."""
    crashes = tmp_path / "crashes"
    crashes.mkdir()
    options: dict[str, Any] = {"defaults": {"best_of": 4}, "seed": 5}
    in_process, on_ray = tmp_path / "in_process", tmp_path / "on_ray"
    run(source, in_process, **options)
    with scripted(CrashOnceGenerator(crashes, "p20", "p45")):
        summary = batch.batch(ON_RAY, BatchOptions(str(source), on_ray, **options), QUIET)
        again = batch.batch(ON_RAY, BatchOptions(str(source), on_ray, **options), QUIET)
    assert {marker.name for marker in crashes.iterdir()} == {"p20", "p45"}
    assert (summary["answered"], summary["failed"]) == (LINES + 1, 1)
    assert again["this_run"]["answered"] == 0
    assert records(on_ray) == records(in_process)
    assert records(on_ray, "failed.jsonl") == records(in_process, "failed.jsonl")


@pytest.mark.usefixtures("kept_processes")
def test_a_model_that_cannot_be_loaded_ends_the_run_with_the_reason(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(factory, "start", failing_start)
    with pytest.raises(StartError, match="no such model"):
        batch.batch(ON_RAY, BatchOptions(str(source), tmp_path / "out"), QUIET)
    assert records(tmp_path / "out") == {}
