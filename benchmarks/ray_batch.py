"""How full engines stay under `nbest batch --ray`: by the actor pool, and by Ray Data in its place.

A scripted engine has SLOTS places, and each candidate takes one for a time that its seed decides: all that takes long
is waiting, so that models play no part. The figure is the share of the places' time that was in use, from the first
line to the last, with the workers there beforehand. Ray Data runs the same worker as an asynchronous callable of
`map_batches`, which is how it keeps several rows of a block under way; a result is handed on when its block is done.

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
from benchmarks.stats import hand_in
from reranker.candidate import Candidate, Prompt
from server.config import Settings
from server.distributed.batch_actors import BatchWorker, Workers, started_workers
from server.generation.base import SamplingParams
from server.pipeline.best_of_n import BestOfN, BestOfNRequest
from tests.support.doubles import ScriptedGeneration, ScriptedGenerator, ScriptedScorer

WORKERS, SLOTS, BEST_OF, LINES = 2, 32, 8, 300
SHORTEST_S, LONGEST_S = 0.1, 1.0
ROWS_A_BLOCK, BLOCKS_IN_FLIGHT = 8, 2
"""Two blocks a worker: as many lines as the pool has in flight, 2 · SLOTS / BEST_OF for each."""
SETTINGS = Settings(ray=True, generator_replicas=str(WORKERS), generator_cpus=0.25, max_num_seqs=SLOTS)


def length_s(seed: int) -> float:
    return random.Random(seed).uniform(SHORTEST_S, LONGEST_S)


class SlotGenerator(ScriptedGenerator):
    """Holds a place for each candidate while it is drawn."""

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
    """The same worker as Ray Data wants it; a row tells when its line was begun and ended."""

    def __init__(self) -> None:
        self._worker = BatchWorker(SETTINGS, slots)
        self._starting: asyncio.Task[None] | None = None

    async def __call__(self, batch: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        self._starting = self._starting or asyncio.create_task(self._worker.start())
        await self._starting
        began_s = time.time()
        (line,) = batch["item"]
        answer = await self._worker.answer(request(int(line)))
        assert not isinstance(answer, Exception)
        yield {"began_s": [began_s], "ended_s": [time.time()]}


async def pool_s(workers: Workers) -> float:
    """Seconds by the pool, with as many lines in flight as the command has."""
    places = asyncio.Semaphore(2 * SLOTS * WORKERS // BEST_OF)

    async def one(line: int) -> None:
        async with places:
            await workers.answer(request(line))

    began_s = time.perf_counter()
    await asyncio.gather(*map(one, range(LINES)))
    return time.perf_counter() - began_s


def ray_data_s() -> float:
    """Seconds by Ray Data, from the first line that a worker begins."""
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
    return float(max(row["ended_s"] for row in answered) - min(row["began_s"] for row in answered))


async def measure() -> dict[str, Any]:
    work_s = sum(length_s(line * BEST_OF + index) for line in range(LINES) for index in range(BEST_OF))
    async with started_workers(SETTINGS, slots) as workers:
        await workers.all_ready()
        seconds = {"actor_pool": await pool_s(workers), "ray_data": await asyncio.to_thread(ray_data_s)}
    ideal_s = work_s / (SLOTS * WORKERS)
    return {
        **{way: {"seconds": taken_s, "places_in_use": ideal_s / taken_s} for way, taken_s in seconds.items()},
        "ideal_seconds": ideal_s,
        "lines": LINES,
        "best_of": BEST_OF,
        "workers": WORKERS,
        "places_a_worker": SLOTS,
        "provenance": provenance(packages=("nbest", "ray")),
    }


if __name__ == "__main__":
    hand_in("ray_batch", asyncio.run(measure()))
