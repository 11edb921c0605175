"""`nbest batch` and `nbest rerank`: read an input file and write a directory of results.

The input is read once for its digest and its number of rows, and compared with the run that the directory already
holds. Then every row without a record is answered. Models are loaded only if such a row is left, and `rerank` starts no
engine. SIGINT and SIGTERM stop the run between two writes; finished rows keep their records.
"""

import asyncio
import contextlib
import json
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping
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
from server.offline.scheduler import BatchBackend, BatchScheduler
from server.offline.summary import summarise
from server.offline.tasks import BatchTaskParser, RerankTaskParser, Task, TaskParser, read_task
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
"""Settings that the results depend on. If one has changed, a run continues only with --accept-changes."""

StartBackend = Callable[[], AbstractAsyncContextManager[BatchBackend]]


class RunInterruptedError(Exception):
    """A signal has stopped the run; the message says how to continue it."""

    def __init__(self, signal_number: int, done: int, rows: int) -> None:
        super().__init__(f"Stopped with {done:,} of {rows:,} lines done; the same command continues with the rest.")
        self.signal_number = signal_number


@dataclass(frozen=True, slots=True)
class BatchOptions:
    """The options of a run besides the settings.

    `defaults` are request fields for the lines that leave them out. `in_flight` is how many candidates run at once; by
    default 1.5 times as many as the engine advances, so that some always wait for a slot.
    """

    source: str
    out: Path
    seed: int = 0
    defaults: Mapping[str, Any] = field(default_factory=dict)
    in_flight: int | None = None
    accept_changes: bool = False
    retry_failed: bool = False


def batch(settings: Settings, options: BatchOptions, console: Console) -> dict[str, Any]:
    """Samples, scores and selects for every line; returns the summary of the directory, earlier runs included.

    Raises:
        OfflineError: the run cannot continue; finished lines are kept.
        RunInterruptedError: SIGINT or SIGTERM arrived.
    """
    model = settings.served_model_name or settings.model
    parser = BatchTaskParser(settings, model, options.seed, options.defaults)
    return _run("batch", settings, options, parser, lambda: _batch_backend(settings, console), console)


def rerank(settings: Settings, options: BatchOptions, console: Console) -> dict[str, Any]:
    """Scores the candidates of every line and selects among them; starts no engine.

    Raises:
        ConfigError: a reward model is a judge that is the policy.
        OfflineError: the run cannot continue; finished lines are kept.
        RunInterruptedError: SIGINT or SIGTERM arrived.
    """
    for name, spec in parse_all(settings.reward_models).items():
        if isinstance(spec, JudgeSpec) and spec.model == OWN_POLICY:
            raise ConfigError(
                f"{name} uses the policy as the judge, and rerank does not start the policy; name another model in "
                "judge:MODEL."
            )
    parser = RerankTaskParser(settings)
    return _run("rerank", settings, options, parser, lambda: _rerank_backend(settings, console), console)


@asynccontextmanager
async def _batch_backend(settings: Settings, console: Console) -> AsyncIterator[BatchBackend]:
    """The engine and the reward models: in this process, or in workers on a Ray cluster."""
    models = f"{settings.model} and {', '.join(settings.reward_models)}"
    if settings.ray:
        from server.distributed.batch_actors import started_workers

        async with loaded(started_workers(settings, factory.start), models, console) as workers:

            async def answer(task: Task, _: RunObserver) -> BestOfNResult:
                return await workers.answer(task.request)

            yield BatchBackend(answer, workers.check_ready)
        return
    async with loaded(factory.start(settings), models, console) as pipeline:
        yield pipeline_backend(pipeline)


def pipeline_backend(pipeline: BestOfN) -> BatchBackend:
    """Answers each task with a run of the pipeline in this process."""

    async def answer(task: Task, observer: RunObserver) -> BestOfNResult:
        return await pipeline.run(task.request, observer)

    return BatchBackend(answer, pipeline.generator.check_ready)


@asynccontextmanager
async def _rerank_backend(settings: Settings, console: Console) -> AsyncIterator[BatchBackend]:
    """The reward models alone; the candidates come from the tasks."""
    no_generator: asyncio.Future[Generator] = asyncio.get_running_loop().create_future()  # never set
    starting = factory.started_scorers(settings, no_generator)
    async with loaded(starting, ", ".join(settings.reward_models), console) as scorers:

        async def answer(task: Task, observer: RunObserver) -> BestOfNResult:
            return await BestOfN(FixedCandidates(task.candidates), scorers).run(task.request, observer)

        yield BatchBackend(answer, FixedCandidates(()).check_ready)


def _run(
    command: str, settings: Settings, options: BatchOptions, parser: TaskParser, start: StartBackend, console: Console
) -> dict[str, Any]:
    logs.configure(settings.log_level, settings.log_format)  # keeps prompts out of the log lines of libraries
    start_s = time.perf_counter()
    with run_directory.locked(options.out):
        spooled = options.source == STDIN
        path = inputs.spool(sys.stdin.buffer, options.out) if spooled else Path(options.source)
        source = inputs.examine(path)
        with run_directory.opened(
            options.out,
            _identity(command, settings, options, source),
            accept_changes=options.accept_changes,
            retry_failed=options.retry_failed,
        ) as records:
            progress = BatchProgress(console, source.rows, len(records.done))
            if len(records.done) < source.rows:
                in_flight = options.in_flight or _in_flight(settings)
                tasks = _tasks(source, parser, settings.max_body_bytes)
                _run_until_signal(_answer(start, tasks, records, progress, in_flight), records, source.rows)
            counts = {
                "lines": source.rows,
                "answered": records.answered,
                "failed": records.failed,
                "this_run": {
                    "answered": progress.results,
                    "failed": progress.failures,
                    "generated_tokens": progress.generated_tokens,
                    "seconds": round(time.perf_counter() - start_s, 3),
                },
            }
        summary = counts | summarise(recover(options.out / RESULTS, Result))
        run_directory.write_text(options.out / SUMMARY, json.dumps(summary, indent=1) + "\n")
        if summary["reward_at_n"]:
            plot_summary(summary, options.out / PLOT)
    _print_summary(summary, options.out, console)
    return summary


def _identity(command: str, settings: Settings, options: BatchOptions, source: inputs.Source) -> dict[str, Any]:
    """What the results depend on; stored in run.json and compared when the run is continued."""
    return {
        "command": command,
        "source": str(source.path),
        "input": {"sha256": source.sha256, "rows": source.rows},
        **settings.model_dump(mode="json", include=set(RESULT_SETTINGS)),
        "seed": options.seed,
        "defaults": {**options.defaults, "best_of": options.defaults.get("best_of", settings.default_best_of)},
    }


def _in_flight(settings: Settings) -> int:
    """Candidates that run at once: 1.5 times as many as the engine advances, so that some always wait for a slot.

    Workers on Ray answer whole lines, so a slot is released when its line ends and not when its candidate ends. There
    the factor is 2.
    """
    if settings.ray:
        return settings.max_num_seqs * 2 * replica_range(settings.generator_replicas)[1]
    return settings.max_num_seqs * 3 // 2


def _tasks(source: inputs.Source, parser: TaskParser, max_line_bytes: int) -> Iterator[Task | Failure]:
    custom_ids = CustomIds()
    for line, row in source.read(max_line_bytes):
        yield read_task(line, row, parser, custom_ids, max_line_bytes)


async def _answer(
    start: StartBackend,
    tasks: Iterator[Task | Failure],
    records: RunDirectory,
    progress: BatchProgress,
    in_flight: int,
) -> None:
    async with start() as backend:
        with progress:
            await BatchScheduler(backend, records, progress.count, in_flight=in_flight).run(tasks)


def _run_until_signal(work: Coroutine[Any, Any, None], records: RunDirectory, rows: int) -> None:
    """Runs the coroutine; SIGINT and SIGTERM cancel it.

    Raises:
        RunInterruptedError: one of the two signals arrived.
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


def _print_summary(summary: dict[str, Any], out: Path, console: Console) -> None:
    message = f"{summary['answered']:,} of {summary['lines']:,} lines answered, in {out / RESULTS}"
    if reward := summary["winner_reward"]:
        message += f"; mean reward {reward['mean']:.2f} ({reward['low']:.2f} … {reward['high']:.2f})"
    console.print(f"{message}.")
    if summary["failed"]:
        console.print(f"{summary['failed']:,} lines failed; {out / FAILED} has the reasons.", style="yellow")
