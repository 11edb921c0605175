"""`nbest batch` and `nbest rerank`: an input file in, a directory of results out.

An input is looked through, compared with what the directory was begun with, and gone through from the first row that
has no record; what goes on meanwhile is in `server.offline`. Models are loaded only where something is left to do, and
to rerank no engine is started. A signal stops the run between two writes: what is done is kept.
"""

import asyncio
import contextlib
import json
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvloop
from rich.console import Console

from reranker.scorers.spec import OWN_POLICY, JudgeSpec, parse_all
from server import factory
from server.config import ConfigError, Settings, replica_range
from server.generation.base import Generator
from server.launch import loaded
from server.observability import logs
from server.offline import inputs, run_directory
from server.offline.custom_ids import CustomIds
from server.offline.fixed_candidates import FixedCandidates
from server.offline.journal import recover
from server.offline.plot import plot_summary
from server.offline.progress import BatchProgress
from server.offline.records import Failure, Result
from server.offline.run_directory import FAILED, RESULTS, SUMMARY, RunDirectory
from server.offline.scheduler import Answer, Run
from server.offline.summary import summarise
from server.offline.tasks import BatchTasks, Kind, RerankTasks, Task, read_task
from server.pipeline.best_of_n import BestOfN
from server.pipeline.types import BestOfNResult, RunObserver

STDIN = "-"
PLOT = "summary.png"
RESULT_SETTINGS = (
    "model",
    "served_model_name",
    "adapter",
    "generator",
    "base_url",
    "reward_models",
    "dtype",
    "reward_dtype",
    "max_model_len",
)
"""Settings that results depend on; a run does not go on under others unasked."""


class RunInterruptedError(Exception):
    """A signal has stopped the run. The message says how to go on."""

    def __init__(self, number: int, done: int, rows: int) -> None:
        super().__init__(f"Stopped with {done:,} of {rows:,} lines done; the same command goes on with the rest.")
        self.number = number


@dataclass(frozen=True, slots=True)
class BatchOptions:
    """What is said about a run beside the settings. `defaults` stand beneath the fields of each line.

    `in_flight` is how many candidates are drawn at once; by default half as many again as the engine advances, so that
    some always wait for a place.
    """

    source: str
    out: Path
    seed: int = 0
    defaults: Mapping[str, Any] = field(default_factory=dict)
    in_flight: int | None = None
    accept_changes: bool = False
    retry_failed: bool = False


@dataclass(frozen=True, slots=True)
class Models:
    """What answers tasks, while it is there."""

    answer: Answer
    check_ready: Callable[[], Awaitable[None]]


def batch(settings: Settings, options: BatchOptions, console: Console) -> dict[str, Any]:
    """Draws, scores and selects for every line; the summary of the directory, also of earlier runs.

    Raises:
        OfflineError: it cannot go on; what is done is kept.
        RunInterruptedError: a signal came.
    """
    kind = BatchTasks(settings, settings.served_model_name or settings.model, options.seed, options.defaults)
    return _run("batch", settings, options, kind, lambda: _drawing(settings, console), console)


def rerank(settings: Settings, options: BatchOptions, console: Console) -> dict[str, Any]:
    """Scores and selects among the candidates that every line brings; no engine is started.

    Raises:
        ConfigError: the judge would be the policy.
        OfflineError: it cannot go on; what is done is kept.
        RunInterruptedError: a signal came.
    """
    for name, spec in parse_all(settings.reward_models).items():
        if isinstance(spec, JudgeSpec) and spec.model == OWN_POLICY:
            raise ConfigError(f"{name} asks the policy, which is not started to rerank; give judge:MODEL another one.")
    return _run("rerank", settings, options, RerankTasks(settings), lambda: _reranking(settings, console), console)


@asynccontextmanager
async def _drawing(settings: Settings, console: Console) -> AsyncIterator[Models]:
    models = f"{settings.model} and {', '.join(settings.reward_models)}"
    if settings.ray:
        from server.distributed.batch_actors import started_workers

        async with loaded(started_workers(settings, factory.start), models, console) as workers:

            async def answer(task: Task, _: RunObserver) -> BestOfNResult:
                return await workers.answer(task.request)

            yield Models(answer, workers.check_ready)
        return
    async with loaded(factory.start(settings), models, console) as pipeline:
        yield drawing_models(pipeline)


def drawing_models(pipeline: BestOfN) -> Models:
    """Tasks are requests to the pipeline."""

    async def answer(task: Task, observer: RunObserver) -> BestOfNResult:
        return await pipeline.run(task.request, observer)

    return Models(answer, pipeline.generator.check_ready)


@asynccontextmanager
async def _reranking(settings: Settings, console: Console) -> AsyncIterator[Models]:
    nobody: asyncio.Future[Generator] = asyncio.get_running_loop().create_future()
    scorers_alone = factory.started_scorers(settings, nobody)
    async with loaded(scorers_alone, ", ".join(settings.reward_models), console) as scorers:

        async def answer(task: Task, observer: RunObserver) -> BestOfNResult:
            return await BestOfN(FixedCandidates(task.given), scorers).run(task.request, observer)

        yield Models(answer, FixedCandidates(()).check_ready)


def _run(
    command: str,
    settings: Settings,
    options: BatchOptions,
    kind: Kind,
    start: Callable[[], AbstractAsyncContextManager[Models]],
    console: Console,
) -> dict[str, Any]:
    logs.configure(settings.log_level, settings.log_format)  # keeps prompts out of the lines of libraries
    begun_s = time.perf_counter()
    with run_directory.locked(options.out):
        spooled = options.source == STDIN
        path = inputs.spool(sys.stdin.buffer, options.out) if spooled else Path(options.source)
        source = inputs.examine(path)
        identity = {
            "command": command,
            "source": str(path),
            "input": {"sha256": source.sha256, "rows": source.rows},
            **settings.model_dump(mode="json", include=set(RESULT_SETTINGS)),
            "seed": options.seed,
            "defaults": {
                **dict(options.defaults),
                "best_of": options.defaults.get("best_of", settings.default_best_of),
            },
        }
        with run_directory.opened(
            options.out, identity, accept_changes=options.accept_changes, retry_failed=options.retry_failed
        ) as records:
            progress = BatchProgress(console, source.rows, len(records.done))
            if len(records.done) < source.rows:
                in_flight = options.in_flight or _in_flight(settings)
                tasks = _tasks(source, kind, settings.max_body_bytes)
                _until_done(_answer(start, tasks, records, progress, in_flight), records, source.rows)
            account = {
                "lines": source.rows,
                "answered": records.answered,
                "failed": records.failed,
                "this_run": {
                    "answered": progress.results,
                    "failed": progress.failures,
                    "generated_tokens": progress.generated_tokens,
                    "seconds": round(time.perf_counter() - begun_s, 3),
                },
            }
        summary = account | summarise(recover(options.out / RESULTS, Result))
        run_directory.write_whole(options.out / SUMMARY, json.dumps(summary, indent=1) + "\n")
        if summary["reward_at_n"]:
            plot_summary(summary, options.out / PLOT)
    _tell(summary, options.out, console)
    return summary


def _in_flight(settings: Settings) -> int:
    """Half as many again as the engines advance, so that some always wait for a place.

    Workers on Ray answer whole lines, so a place is free when its line has ended and not its candidate: twice as many.
    """
    if settings.ray:
        return settings.max_num_seqs * 2 * replica_range(settings.generator_replicas)[1]
    return settings.max_num_seqs * 3 // 2


def _tasks(source: inputs.Source, kind: Kind, max_line_bytes: int) -> Iterator[Task | Failure]:
    names = CustomIds()
    for line, row in source.read(max_line_bytes):
        yield read_task(line, row, kind, names, max_line_bytes)


async def _answer(
    start: Callable[[], AbstractAsyncContextManager[Models]],
    tasks: Iterator[Task | Failure],
    records: RunDirectory,
    progress: BatchProgress,
    in_flight: int,
) -> None:
    async with start() as models:
        with progress:
            await Run(models.answer, models.check_ready, records, progress, in_flight=in_flight).through(tasks)


def _until_done(work: Coroutine[Any, Any, None], records: RunDirectory, rows: int) -> None:
    """Runs the work, which SIGINT and SIGTERM cancel.

    Raises:
        RunInterruptedError: one of them came.
    """
    signals: list[int] = []

    async def cancellable() -> None:
        task = asyncio.ensure_future(work)

        def stop(number: int) -> None:
            signals.append(number)
            task.cancel()

        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, stop, number)
        with contextlib.suppress(asyncio.CancelledError):
            await task

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(cancellable())
    if signals:
        raise RunInterruptedError(signals[0], len(records.done), rows)


def _tell(summary: dict[str, Any], out: Path, console: Console) -> None:
    told = f"{summary['answered']:,} of {summary['lines']:,} lines answered, in {out / RESULTS}"
    if reward := summary["winner_reward"]:
        told += f"; mean reward {reward['mean']:.2f} ({reward['low']:.2f} … {reward['high']:.2f})"
    console.print(f"{told}.")
    if summary["failed"]:
        console.print(f"{summary['failed']:,} lines failed; {out / FAILED} tells why.", style="yellow")
