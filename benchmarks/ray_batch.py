"""Engine utilisation of `nbest batch --ray`: the actor pool against Ray Data.

A scripted engine has SLOTS slots, and each candidate occupies a slot for a time that depends on its seed. The engine
only waits, so models do not affect the figure: the share of slot time in use from the first line to the last, with the
workers already started. Ray Data runs the same worker as an asynchronous callable of `map_batches`, which processes
several rows of a block concurrently; it yields a result when the whole block is done.

    python -m benchmarks.ray_batch

Writes benchmarks/results/ray_batch.json; the last line of output is the same JSON.
"""

import asyncio
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import ray
import ray.data

from benchmarks.provenance import provenance
from benchmarks.stats import write_result
from reranker.candidate import Candidate, Prompt
from server.config import Settings
from server.distributed.batch_actors import BatchWorker, WorkerPool, started_workers
from server.generation.base import SamplingParams
from server.pipeline.best_of_n import BestOfN
from server.pipeline.types import BestOfNRequest
from tests.support.doubles import ScriptedGeneration, ScriptedGenerator, ScriptedScorer

WORKERS, SLOTS, BEST_OF, LINES = 2, 32, 8, 300
SHORTEST_S, LONGEST_S = 0.1, 1.0
ROWS_A_BLOCK, BLOCKS_IN_FLIGHT = 8, 2
"""Two blocks for each worker: as many lines in flight as in the pool, 2 · SLOTS / BEST_OF for each worker."""
SETTINGS = Settings(ray=True, generator_replicas=str(WORKERS), generator_cpus=0.25, max_num_seqs=SLOTS)


def length_s(seed: int) -> float:
    return random.Random(seed).uniform(SHORTEST_S, LONGEST_S)


class SlotGenerator(ScriptedGenerator):
    """Occupies a slot for each candidate while it is sampled."""

    def __init__(self) -> None:
        super().__init__(["word"])
        self._slots = asyncio.Semaphore(SLOTS)

    def generate(
        self, prompt: Prompt, sampling: SamplingParams, n: int, *, stream_partial: bool = False
    ) -> ScriptedGeneration:
        return SlotGeneration(self, sampling, n, self._slots)


class SlotGeneration(ScriptedGeneration):
    def __init__(self, generator: SlotGenerator, sampling: SamplingParams, n: int, slots: asyncio.Semaphore) -> None:
        super().__init__(generator, sampling, n, stream_partial=False)
        self._slots = slots
        self._seed = sampling.seed or 0

    async def _write(self, index: int) -> None:
        async with self._slots:
            await asyncio.sleep(length_s(self._seed + index))
            self._outcomes.put_nowait(Candidate(index, "word", 1, finish_reason="stop"))


@asynccontextmanager
async def slots(_: Settings) -> AsyncIterator[BestOfN]:
    scorer = ScriptedScorer()
    yield BestOfN(SlotGenerator(), {scorer.name: scorer})


def request(line: int) -> BestOfNRequest:
    return BestOfNRequest(Prompt(text="p"), SamplingParams(seed=line * BEST_OF), BEST_OF)


class DataWorker:
    """The same worker as a callable for Ray Data; a row has the start and end times of its line."""

    def __init__(self) -> None:
        self._worker = BatchWorker(SETTINGS, slots)
        self._starting: asyncio.Task[None] | None = None

    async def __call__(self, batch: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        self._starting = self._starting or asyncio.create_task(self._worker.start())
        await self._starting
        start_s = time.time()
        (line,) = batch["item"]
        answer = await self._worker.answer(request(int(line)))
        assert not isinstance(answer, Exception)
        yield {"start_s": [start_s], "end_s": [time.time()]}


async def pool_s(workers: WorkerPool) -> float:
    """Seconds of the actor pool, with as many lines in flight as the command has."""
    in_flight = asyncio.Semaphore(2 * SLOTS * WORKERS // BEST_OF)

    async def answer(line: int) -> None:
        async with in_flight:
            await workers.answer(request(line))

    start_s = time.perf_counter()
    await asyncio.gather(*map(answer, range(LINES)))
    return time.perf_counter() - start_s


def ray_data_s() -> float:
    """Seconds of Ray Data, from the start of the first line to the end of the last."""
    ray.data.DataContext.get_current().enable_progress_bars = False
    rows = ray.data.from_items(list(range(LINES)), override_num_blocks=LINES // ROWS_A_BLOCK)
    answered = rows.map_batches(
        DataWorker,
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=WORKERS, max_tasks_in_flight_per_actor=BLOCKS_IN_FLIGHT),
        max_concurrency=BLOCKS_IN_FLIGHT,
        num_cpus=0.25,
    ).take_all()
    assert len(answered) == LINES
    return float(max(row["end_s"] for row in answered) - min(row["start_s"] for row in answered))


async def measure() -> dict[str, Any]:
    work_s = sum(length_s(line * BEST_OF + index) for line in range(LINES) for index in range(BEST_OF))
    async with started_workers(SETTINGS, slots) as workers:
        await workers.all_ready()
        seconds = {"actor_pool": await pool_s(workers), "ray_data": await asyncio.to_thread(ray_data_s)}
    ideal_s = work_s / (SLOTS * WORKERS)
    return {
        **{way: {"seconds": elapsed_s, "slots_in_use": ideal_s / elapsed_s} for way, elapsed_s in seconds.items()},
        "ideal_seconds": ideal_s,
        "lines": LINES,
        "best_of": BEST_OF,
        "workers": WORKERS,
        "slots_a_worker": SLOTS,
        "provenance": provenance(packages=("nbest", "ray")),
    }


if __name__ == "__main__":
    write_result("ray_batch", asyncio.run(measure()))
