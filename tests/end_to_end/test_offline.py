"""Offline runs use the pipeline of the shared server, and give the same results as its HTTP endpoints."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
from rich.console import Console

from server import factory
from server.generation.base import Outcome
from server.offline import batch
from server.offline.batch import BatchOptions
from server.offline.export import ExportOptions, run_export
from server.pipeline.types import BestOfNRequest, BestOfNResult, RunObserver
from tests.end_to_end.served import Served
from tests.support.offline_runs import records, write_lines

pytestmark = pytest.mark.engine

OPENINGS = ("This film is", "I saw this movie last night and", "The acting in this picture is", "The screenplay")


class PipelineOfServer:
    """The server's pipeline, whose event loop runs in another thread, with the interface that `nbest batch` uses."""

    def __init__(self, served: Served) -> None:
        self.generator = served.generator
        self.scorers = served.pipelines[0].scorers
        self._pipeline = served.pipelines[0]
        self._loop = served.loops[0]

    async def run(self, request: BestOfNRequest, observer: RunObserver) -> BestOfNResult:
        loop = asyncio.get_running_loop()

        class InThisLoop(RunObserver):
            def outcome(self, outcome: Outcome) -> None:
                loop.call_soon_threadsafe(observer.outcome, outcome)

        running = self._pipeline.run(request, InThisLoop())
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(running, self._loop))


@pytest.fixture
def run_batch(served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    @asynccontextmanager
    async def start(*_: Any) -> AsyncIterator[PipelineOfServer]:
        yield PipelineOfServer(served)

    monkeypatch.setattr(factory, "start", start)

    def run(lines: list[Any], **options: Any) -> Path:
        source, out = write_lines(tmp_path / "in.jsonl", lines), tmp_path / "out"
        batch.batch(served.settings, BatchOptions(str(source), out, **options), Console(quiet=True))
        return out

    return run


def test_an_offline_run_gives_the_servers_candidates_for_the_same_seed(
    run_batch: Callable[..., Path], client: openai.OpenAI, tmp_path: Path
) -> None:
    out = run_batch([{"prompt": opening} for opening in OPENINGS], defaults={"best_of": 4, "max_tokens": 12}, seed=3)
    by_line = records(out)
    assert len(by_line) == len(OPENINGS)
    for record in by_line.values():
        reply: Any = client.completions.create(
            model=record["model"],
            prompt=record["prompt"],
            max_tokens=12,
            seed=record["seed"],
            extra_body={"best_of": 4, "nbest": {"return_candidates": True}},
        )
        offline, online = record["candidates"], reply.nbest["candidates"]
        assert [candidate["text"] for candidate in offline] == [candidate["text"] for candidate in online]
        assert record["winner"]["text"] == reply.choices[0].text
        for measure in ("reward", "cumulative_logprob"):
            expected = [candidate[measure] for candidate in online]
            assert [candidate[measure] for candidate in offline] == pytest.approx(expected, abs=1e-3)
    run_export(out, tmp_path / "pairs.jsonl", ExportOptions("preference"))
    pairs = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    assert [pair["prompt"] for pair in pairs] == list(OPENINGS)
    assert all(pair["margin"] > 0 for pair in pairs)


def test_seeded_prompts_that_exceed_an_engine_step_do_not_stop_the_engine(run_batch: Callable[..., Path]) -> None:
    """About 300 tokens each and 24 sequences at once: together more than the engine reads in one step."""
    lines = [
        {"prompt": f"{number}. " + "A review of a film I saw. " * 40, "nbest": {"reward_model": "likely"}}
        for number in range(12)
    ]
    assert len(records(run_batch(lines, defaults={"best_of": 2, "max_tokens": 2}))) == 12
