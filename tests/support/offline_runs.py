"""Offline runs with scripted doubles, in this process or in a child process that can be killed."""

import json
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any
from unittest import mock

from rich.console import Console

from reranker.candidate import Prompt
from server import factory, launch
from server.config import Settings
from server.generation.base import SamplingParams
from server.offline import batch
from server.offline.batch import BatchOptions
from server.pipeline.best_of_n import BestOfN
from tests.support.doubles import ScriptedGeneration, ScriptedGenerator, ScriptedScorer

QUIET = Console(quiet=True)
SETTINGS = Settings(model="scripted", reward_models={"length": "logprob"}, max_num_seqs=8)


class SeededGenerator(ScriptedGenerator):
    """The text of candidate i is the prompt and a word that depends on its seed.

    Candidates finish up to 2 · `delay_s` apart, so that those of other requests finish in between.
    """

    def __init__(self, delay_s: float = 0) -> None:
        super().__init__([])
        self.delay_s = delay_s

    def generate(
        self, prompt: Prompt, sampling: SamplingParams, n: int, *, stream_partial: bool = False
    ) -> ScriptedGeneration:
        self.calls.append((prompt, sampling, n))
        seeds = [(sampling.seed or 0) + index for index in range(n)]
        words = [f"{prompt.text} {'x' * (seed * 2654435761 % 97)}" for seed in seeds]
        delays_s = {index: self.delay_s * (seed % 3) for index, seed in enumerate(seeds)}
        return ScriptedGeneration(ScriptedGenerator(words, delays_s=delays_s), sampling, n, stream_partial)


@contextmanager
def scripted(generator: ScriptedGenerator, scorer: ScriptedScorer | None = None) -> Iterator[None]:
    """Within the block `nbest batch` and `nbest rerank` use these doubles in place of the models.

    The command kills all child processes of its process; in a test these include the engines of other tests, so here it
    kills none.
    """

    @asynccontextmanager
    async def start(*_: Any) -> AsyncIterator[BestOfN]:
        yield BestOfN(generator, {"length": scorer or ScriptedScorer()})

    @asynccontextmanager
    async def started_scorers(*_: Any) -> AsyncIterator[dict[str, ScriptedScorer]]:
        yield {"length": scorer or ScriptedScorer()}

    with (
        mock.patch.multiple(factory, start=start, started_scorers=started_scorers),
        mock.patch.object(launch, "kill_children"),
    ):
        yield


def write_lines(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return path


def records(out: Path, name: str = "results.jsonl") -> dict[int, dict[str, Any]]:
    """The records by input line; asserts that no line has two."""
    all_records = [json.loads(line) for line in (out / name).read_text().splitlines()]
    by_line = {record["line"]: record for record in all_records}
    assert len(by_line) == len(all_records), f"a line occurs twice in {name}"
    return by_line


def run(source: Path, out: Path, generator: ScriptedGenerator | None = None, **options: Any) -> dict[str, Any]:
    with scripted(generator or SeededGenerator()):
        return batch.batch(SETTINGS, BatchOptions(str(source), out, **options), QUIET)


def run_in_child(source: Path, out: Path, delay_s: float, defaults: Mapping[str, Any], started: Event) -> None:
    """The function of a child process: sets `started`, and then runs."""
    started.set()
    run(source, out, SeededGenerator(delay_s), defaults=defaults, in_flight=8)
