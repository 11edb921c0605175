"""`nbest batch --ray` over scripted doubles: the same results, also when workers die."""

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

pytestmark = pytest.mark.filterwarnings("ignore")  # Ray's own
ON_RAY = SETTINGS.model_copy(update={"ray": True, "generator_replicas": "2", "generator_cpus": 0.5})
LINES = 60


class Mortal(SeededGenerator):
    """Ends its process at these prompts, as long as their file is not there; the file is made by the dying."""

    def __init__(self, graves: Path, *deadly: str) -> None:
        super().__init__(delay_s=0.002)
        self._graves = graves
        self._deadly = deadly

    def generate(
        self, prompt: Prompt, sampling: SamplingParams, n: int, *, stream_partial: bool = False
    ) -> ScriptedGeneration:
        grave = self._graves / (prompt.text or "")
        if prompt.text in self._deadly and not grave.exists():
            grave.touch()
            os._exit(1)
        return super().generate(prompt, sampling, n, stream_partial=stream_partial)


@asynccontextmanager
async def cannot_start(settings: Any, *_: Any) -> AsyncIterator[BestOfN]:
    if settings.model:
        raise RuntimeError("no such model")
    yield BestOfN(SeededGenerator(), {})


@pytest.fixture
def source(tmp_path: Path) -> Path:
    lines: list[Any] = [{"prompt": f"p{line}"} for line in range(1, LINES + 1)]
    return write_lines(tmp_path / "in.jsonl", [*lines, "not json\n", {"prompt": "last", "best_of": 3}])


@pytest.fixture
def kept_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of this process not all children are Ray's: others are the engines of other tests."""
    for module in (cluster, launch):
        monkeypatch.setattr(module, "kill_children", lambda: None)


@pytest.mark.usefixtures("kept_processes")
def test_workers_that_die_cost_no_line_and_change_no_result(source: Path, tmp_path: Path) -> None:
    """Two deaths, of which one takes the line that is tried again; then the same command has nothing left to do."""
    graves = tmp_path / "graves"
    graves.mkdir()
    options: dict[str, Any] = {"defaults": {"best_of": 4}, "seed": 5}
    here, there = tmp_path / "here", tmp_path / "there"
    run(source, here, **options)
    with scripted(Mortal(graves, "p20", "p45")):
        summary = batch.batch(ON_RAY, BatchOptions(str(source), there, **options), QUIET)
        again = batch.batch(ON_RAY, BatchOptions(str(source), there, **options), QUIET)
    assert {grave.name for grave in graves.iterdir()} == {"p20", "p45"}
    assert (summary["answered"], summary["failed"]) == (LINES + 1, 1)
    assert again["this_run"]["answered"] == 0
    assert records(there) == records(here)
    assert records(there, "failed.jsonl") == records(here, "failed.jsonl")


@pytest.mark.usefixtures("kept_processes")
def test_a_model_that_cannot_be_loaded_ends_the_run_with_the_reason(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(factory, "start", cannot_start)
    with pytest.raises(StartError, match="no such model"):
        batch.batch(ON_RAY, BatchOptions(str(source), tmp_path / "out"), QUIET)
    assert records(tmp_path / "out") == {}
