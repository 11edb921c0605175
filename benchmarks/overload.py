"""Latency of admitted requests and number of rejected ones at one and ten times the server's capacity.

A server process answers completions over a real socket. This process sends them open loop: arrivals are Poisson and do
not wait for replies, as those of independent clients. Load is given as a multiple of capacity, the number of candidates
a second that the engine completes. For the scripted engine capacity is computed; for the real one it is measured first,
with as many requests in flight as may run.

The scripted engine advances up to SLOTS sequences by one token every STEP_S, first come, first served, as continuous
batching does; further sequences wait in its queue. By default a request takes at least two seconds, so that ten times
capacity is still few requests a second and neither HTTP nor the client limits the figures; `in_server_p95_s` is the
latency without both. --unbounded switches admission control off, for comparison.

    python -m benchmarks.overload                # scripted engine: each of the two loads takes about --seconds
    python -m benchmarks.overload --engine real --rates 1 10 --seconds 60

Writes benchmarks/results/overload.json.
"""

import argparse
import asyncio
import dataclasses
import multiprocessing
import os
import random
import resource
import socket
import statistics
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from itertools import repeat
from types import TracebackType
from typing import Any, Self

import httpx
import psutil
import uvicorn

from benchmarks.provenance import provenance
from benchmarks.stats import percentiles, write_result
from reranker.candidate import Candidate, Prompt
from server import factory
from server.app import create_app
from server.config import Settings
from server.generation.base import FixedWeights, Outcome, SamplingParams
from server.generation.outcome_queue import OutcomeQueue
from server.http.limits import bounded_protocol
from server.launch import kill_children
from server.observability.metrics import Metrics
from server.pipeline.best_of_n import BestOfN
from tests.support.doubles import ScriptedScorer

SLOTS = 64
STEP_S = 0.025
NO_LIMIT = 10**9
SCRIPTED_MODEL = "scripted"
SEED = 1


@dataclasses.dataclass(slots=True)
class Sequence:
    """A candidate that the scripted engine generates."""

    index: int
    tokens_left: int
    num_tokens: int
    outcomes: OutcomeQueue


class FixedRateEngine(FixedWeights):
    """Adds a token to each of the first SLOTS sequences every STEP_S."""

    model = SCRIPTED_MODEL

    def __init__(self) -> None:
        self.sequences: list[Sequence] = []

    async def run(self) -> None:
        next_s = time.monotonic()
        while True:
            next_s = max(next_s + STEP_S, time.monotonic())
            await asyncio.sleep(next_s - time.monotonic())
            for sequence in self.sequences[:SLOTS]:
                sequence.tokens_left -= 1
                if not sequence.tokens_left:
                    sequence.outcomes.put(
                        Candidate(sequence.index, "word", sequence.num_tokens, finish_reason="length")
                    )
            self.sequences = [sequence for sequence in self.sequences if sequence.tokens_left]

    def generate(
        self, prompt: Prompt, sampling: SamplingParams, n: int, *, stream_partial: bool = False
    ) -> "FixedRateGeneration":
        return FixedRateGeneration(self, sampling.max_tokens or 1, n)

    async def check_ready(self) -> None:
        pass

    async def close(self) -> None:
        pass


class FixedRateGeneration:
    """The candidates of one request in the scripted engine."""

    prompt_tokens = 1

    def __init__(self, engine: FixedRateEngine, num_tokens: int, n: int) -> None:
        self._engine = engine
        self._outcomes = OutcomeQueue(n)
        self._sequences = [Sequence(index, num_tokens, num_tokens, self._outcomes) for index in range(n)]

    async def __aenter__(self) -> Self:
        self._engine.sequences += self._sequences
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for sequence in self._sequences:
            await self.cancel(sequence.index)

    def __aiter__(self) -> AsyncIterator[list[Outcome]]:
        return aiter(self._outcomes)

    async def cancel(self, index: int) -> None:
        if self._outcomes.drop(index):
            cancelled = self._sequences[index]
            self._engine.sequences = [sequence for sequence in self._engine.sequences if sequence is not cancelled]


@asynccontextmanager
async def scripted() -> AsyncIterator[BestOfN]:
    engine, scorer = FixedRateEngine(), ScriptedScorer()
    running = asyncio.create_task(engine.run())
    yield BestOfN(engine, {scorer.name: scorer})
    running.cancel()


def serve(listener: socket.socket, settings: Settings, *, real: bool) -> None:
    """The server process: the shipped app and protocol, with an additional route that returns its memory."""
    metrics = Metrics()

    def start() -> AbstractAsyncContextManager[BestOfN]:
        return factory.start(settings, metrics.observe_batch) if real else scripted()

    async def memory() -> dict[str, int]:
        rss = psutil.Process(os.getpid()).memory_info().rss
        return {"rss": rss, "peak_rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}

    app = create_app(start, settings, metrics)
    app.add_api_route("/memory", memory)
    config = uvicorn.Config(
        app, loop="uvloop", http=bounded_protocol(settings), ws="none", access_log=False, log_level="warning"
    )
    try:
        uvicorn.Server(config).run(sockets=[listener])
    finally:
        kill_children()


@dataclasses.dataclass(slots=True)
class Load:
    """The outcomes of the requests of one load. Requests that got a 429 are in `retry_after_s` and `shed_after_s`."""

    latencies_s: list[float] = dataclasses.field(default_factory=list)
    in_server_s: list[float] = dataclasses.field(default_factory=list)
    queued_s: list[float] = dataclasses.field(default_factory=list)
    retry_after_s: list[int] = dataclasses.field(default_factory=list)
    shed_after_s: list[float] = dataclasses.field(default_factory=list)
    failed: dict[str, int] = dataclasses.field(default_factory=dict)


async def send(client: httpx.AsyncClient, body: dict[str, Any], load: Load) -> None:
    start_s = time.perf_counter()
    try:
        reply = await client.post("/v1/completions", json=body)
    except httpx.HTTPError as error:
        load.failed[type(error).__name__] = load.failed.get(type(error).__name__, 0) + 1
        return
    elapsed_s = time.perf_counter() - start_s
    if reply.is_success:
        load.latencies_s.append(elapsed_s)
        timings_s = reply.json()["nbest"]["timings_s"]
        load.in_server_s.append(timings_s["total"])
        load.queued_s.append(timings_s["queue"])
    elif reply.status_code == 429:
        load.shed_after_s.append(elapsed_s)
        load.retry_after_s.append(int(reply.headers["Retry-After"]))
    else:
        load.failed[str(reply.status_code)] = load.failed.get(str(reply.status_code), 0) + 1


async def open_loop(
    client: httpx.AsyncClient, bodies: Iterator[dict[str, Any]], rate_per_s: float, seconds: float
) -> Load:
    """Sends a request at each Poisson arrival for `seconds`, after a warm-up of a fifth of it that is not counted."""
    rng, warm_up, load = random.Random(SEED), Load(), Load()
    start_s = due_s = time.perf_counter()
    warm_up_end_s = start_s + seconds / 5
    async with asyncio.TaskGroup() as tasks:
        while due_s < warm_up_end_s + seconds:
            await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
            tasks.create_task(send(client, next(bodies), warm_up if due_s < warm_up_end_s else load))
            due_s += rng.expovariate(rate_per_s)
    return load


async def measured_capacity(
    client: httpx.AsyncClient, body: dict[str, Any], settings: Settings, seconds: float
) -> float:
    """Completed candidates a second with as many requests in flight as may run."""
    load = Load()
    end_s = time.perf_counter() + seconds

    async def send_until_the_end() -> None:
        while time.perf_counter() < end_s:
            await send(client, body, load)

    await send(client, body, Load())
    start_s, best_of = time.perf_counter(), int(body["best_of"])
    await asyncio.gather(*(send_until_the_end() for _ in range(settings.max_num_seqs // best_of)))
    return len(load.latencies_s) * best_of / (time.perf_counter() - start_s)


def summary(load: Load, memory: dict[str, int]) -> dict[str, Any]:
    def p(values: list[float], percent: int) -> float | None:
        if len(values) < 2:
            return None
        return round(percentiles(values)[f"p{percent}"], 4)

    return {
        "accepted": len(load.latencies_s),
        "p50_s": p(load.latencies_s, 50),
        "p95_s": p(load.latencies_s, 95),
        "in_server_p95_s": p(load.in_server_s, 95),
        "queue_p95_s": p(load.queued_s, 95),
        "status_429": len(load.retry_after_s),
        "shed_p95_s": p(load.shed_after_s, 95),
        "retry_after_median_s": statistics.median(load.retry_after_s) if load.retry_after_s else None,
        "failed": load.failed,
        "server_rss_mib": round(memory["rss"] / 2**20, 1),
        "server_peak_rss_mib": round(memory["peak_rss"] / 2**20, 1),
    }


async def measure(url: str, settings: Settings, flags: argparse.Namespace) -> dict[str, Any]:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=100)
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as client:
        while (await client.get("/ready")).is_error:  # noqa: ASYNC110  # another process sets no event
            await asyncio.sleep(0.1)
        [model] = (await client.get("/v1/models")).json()["data"]
        body = {
            "model": model["id"],
            "prompt": "I saw this movie last night and",
            "best_of": flags.best_of,
            "max_tokens": flags.tokens,
            "temperature": 1.0,
        }
        if flags.engine == "real":
            capacity = await measured_capacity(client, body, settings, flags.seconds / 2)
        else:
            capacity = SLOTS / (flags.tokens * STEP_S)
        print(f"capacity: {capacity:.1f} candidates a second")
        loads = {}
        for multiple in flags.rates:
            load = await open_loop(client, repeat(body), multiple * capacity / flags.best_of, flags.seconds)
            loads[f"{multiple:g}x"] = summary(load, (await client.get("/memory")).json())
            print(f"{multiple:g}x: {loads[f'{multiple:g}x']}")
    return {"capacity_candidates_per_s": round(capacity, 2), "request": body, "loads": loads}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=["scripted", "real"], default="scripted")
    parser.add_argument("--rates", type=float, nargs="+", default=[1.0, 10.0], help="loads as multiples of capacity")
    parser.add_argument("--seconds", type=float, default=30.0, help="duration of each load, after a warm-up of a fifth")
    parser.add_argument("--best-of", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=80, help="max_tokens of each candidate")
    parser.add_argument("--unbounded", action="store_true", help="switch admission control off")
    parser.add_argument("--name", default="overload", help="name of the result file")
    flags = parser.parse_args()

    off: dict[str, Any] = {}
    if flags.unbounded:
        off = {"max_running_candidates": NO_LIMIT, "max_concurrent_requests": NO_LIMIT}
    settings = Settings(port=0, max_num_seqs=SLOTS, max_best_of=SLOTS, **off)
    with socket.create_server(("127.0.0.1", 0), backlog=2048) as listener:
        server = multiprocessing.get_context("spawn").Process(
            target=serve, args=(listener, settings), kwargs={"real": flags.engine == "real"}
        )
        server.start()
        try:
            result = asyncio.run(measure(f"http://127.0.0.1:{listener.getsockname()[1]}", settings, flags))
        finally:
            server.terminate()
            server.join()
    p95_s = [load["p95_s"] for load in result["loads"].values()]
    if None not in p95_s:
        result["p95_ratio_last_to_first"] = round(p95_s[-1] / p95_s[0], 3)
    write_result(flags.name, {**result, "provenance": provenance(vars(flags))})


if __name__ == "__main__":
    main()
