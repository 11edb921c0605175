"""Latency and cost of `nbest serve` against N, measured over HTTP by streaming clients.

    candidates     best_of = 1, 2, 4, … 64, one request at a time
    concurrency    best_of = 16, several requests at a time
    prompt         best_of = 16, prompts of different lengths
    length         best_of = 16, candidates of different lengths
    goodput        best_of = 4, open loop with Poisson arrivals: answers a second within an objective of three times the
                   median latency of a single request

Measured are percentiles of the time to the first and to the last token, tokens, CPU-seconds of all processes of the
server (user and system), their peak resident memory, and the price. The price of a request is the machine's for the
time that the request had it to itself (with k requests at a time, a k-th of it) plus that of its tokens.

    python -m benchmarks.latency [--short] [--ray] [--price-per-hour 0.1] [--price-per-million 0 0 0]

Writes benchmarks/results/latency.json, with --ray latency_ray.json. With ten requests the 99th percentile is nearly the
slowest request.
"""

import argparse
import asyncio
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import count
from typing import Any

import httpx
import psutil
from rich.console import Console

from benchmarks.film_reviews import OPENINGS
from benchmarks.overload import open_loop
from benchmarks.prices import Prices
from benchmarks.provenance import provenance
from benchmarks.server_processes import nbest_serve
from benchmarks.stats import percentiles, write_result

MODEL = "smollm2-135m-instruct"
N = (1, 2, 4, 8, 16, 32, 64)
SENTENCE = "The crowd at the festival cheered for every scene of it. "
"""About twelve tokens."""
OBJECTIVE_OF_MEDIAN = 3.0
GOODPUT_BEST_OF = 4
LOADS = (0.5, 0.8, 1.0, 1.3)
"""Arrival rates, as a share of the requests a second that the server answers with eight at a time."""
MEMORY_EVERY_S = 0.2

console = Console(stderr=True)


@dataclass(frozen=True, slots=True)
class Case:
    """A kind of request, and the number of them in flight at a time."""

    best_of: int = 16
    prompt_sentences: int = 9
    max_tokens: int = 64
    at_once: int = 1


@dataclass(slots=True)
class Answers:
    """Times and token counts of the requests of a case, one entry each."""

    first_token_s: list[float] = field(default_factory=list)
    total_s: list[float] = field(default_factory=list)
    prompt_tokens: list[int] = field(default_factory=list)
    generated_tokens: list[int] = field(default_factory=list)
    scored_tokens: list[int] = field(default_factory=list)


class ServerProcesses:
    """CPU time and resident memory of a server's process and its children."""

    def __init__(self, pid: int) -> None:
        self._parent = psutil.Process(pid)
        self.peak_rss = 0

    def _all(self) -> list[psutil.Process]:
        return [self._parent, *self._parent.children(recursive=True)]

    def cpu_s(self) -> float:
        """User and system seconds of all processes since their start."""
        total = 0.0
        for process in self._all():
            try:
                times = process.cpu_times()
            except psutil.NoSuchProcess:
                continue
            total += times.user + times.system
        return total

    async def watch(self) -> None:
        """Updates `peak_rss`, the highest sum of resident memory in bytes, until cancelled."""
        while True:
            rss = 0
            for process in self._all():
                try:
                    rss += process.memory_info().rss
                except psutil.NoSuchProcess:
                    continue
            self.peak_rss = max(self.peak_rss, rss)
            await asyncio.sleep(MEMORY_EVERY_S)


def body(case: Case, number: int) -> dict[str, Any]:
    """A request's JSON. Its opening comes last, so that the prefix cache holds only the sentences that all share."""
    prompt = SENTENCE * case.prompt_sentences + OPENINGS[number % len(OPENINGS)]
    return {
        "model": MODEL,
        "prompt": prompt,
        "best_of": case.best_of,
        "max_tokens": case.max_tokens,
        "seed": 10_000 * number,
    }


async def send(client: httpx.AsyncClient, request: dict[str, Any], answers: Answers) -> None:
    """Streams a request's reply and records its times and token counts."""
    start_s, first_s = time.perf_counter(), 0.0
    streaming = {**request, "stream": True, "stream_options": {"include_usage": True}}
    async with client.stream("POST", "/v1/completions", json=streaming) as reply:
        reply.raise_for_status()
        async for line in reply.aiter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line.removeprefix("data: "))
            if not first_s and chunk["choices"] and chunk["choices"][0]["text"]:
                first_s = time.perf_counter()
            details = chunk.get("nbest") or {}
            if "generated_tokens" in details:
                answers.generated_tokens.append(details["generated_tokens"])
                answers.scored_tokens.append(details["scored_tokens"])
            if chunk.get("usage"):
                answers.prompt_tokens.append(chunk["usage"]["prompt_tokens"])
    end_s = time.perf_counter()
    answers.first_token_s.append((first_s or end_s) - start_s)
    answers.total_s.append(end_s - start_s)


async def closed_loop(
    client: httpx.AsyncClient, processes: ServerProcesses, case: Case, requests: int, prices: Prices
) -> Any:
    """Sends `requests` requests, `at_once` of them in flight at any time, after `at_once` requests to warm up."""
    for number in range(case.at_once):
        await send(client, body(case, requests + number), Answers())
    numbers, answers = list(range(requests)), Answers()

    async def send_until_none_is_left() -> None:
        while numbers:
            await send(client, body(case, numbers.pop(0)), answers)

    processes.peak_rss = 0
    watching = asyncio.create_task(processes.watch())
    cpu_s, start_s = processes.cpu_s(), time.perf_counter()
    await asyncio.gather(*(send_until_none_is_left() for _ in range(case.at_once)))
    elapsed_s, cpu_s = time.perf_counter() - start_s, processes.cpu_s() - cpu_s
    watching.cancel()
    figures = summary(answers, elapsed_s, prices) | {
        "cpu_s_a_request": cpu_s / requests,
        "peak_rss_bytes": processes.peak_rss,
    }
    console.print(f"{case}: {figures['total_s']['p50']:.2f} s, {figures['tokens_per_s']:.0f} tokens/s")
    return asdict(case) | figures


def summary(answers: Answers, elapsed_s: float, prices: Prices) -> dict[str, Any]:
    """The figures of a case, whose requests took `elapsed_s` altogether."""
    requests = len(answers.total_s)
    means = [
        statistics.fmean(tokens) for tokens in (answers.prompt_tokens, answers.generated_tokens, answers.scored_tokens)
    ]
    return {
        "requests": requests,
        "first_token_s": percentiles(answers.first_token_s),
        "total_s": percentiles(answers.total_s),
        "requests_per_s": requests / elapsed_s,
        "tokens_per_s": sum(answers.generated_tokens) / elapsed_s,
        "prompt_tokens": means[0],
        "generated_tokens": means[1],
        "scored_tokens": means[2],
        "price": prices.of(elapsed_s / requests, *means),
    }


def good(latencies_s: Sequence[float], objective_s: float, seconds: float) -> dict[str, float]:
    """Answers a second within the objective, and their share of all answers."""
    in_time = sum(latency_s <= objective_s for latency_s in latencies_s)
    return {"per_s": in_time / seconds, "share": in_time / len(latencies_s) if latencies_s else 0.0}


async def goodput(
    client: httpx.AsyncClient, processes: ServerProcesses, prices: Prices, seconds: float
) -> dict[str, Any]:
    """Answers a second within the objective, at each share of capacity."""
    case = Case(best_of=GOODPUT_BEST_OF)
    single = await closed_loop(client, processes, case, 6, prices)
    full = await closed_loop(client, processes, Case(best_of=GOODPUT_BEST_OF, at_once=8), 32, prices)
    objective_s, capacity = OBJECTIVE_OF_MEDIAN * single["total_s"]["p50"], full["requests_per_s"]
    loads = {}
    for share in LOADS:
        load = await open_loop(client, map(partial(body, case), count()), share * capacity, seconds)
        loads[str(share)] = {
            "requests_per_s": share * capacity,
            "answered": len(load.latencies_s),
            "turned_away": len(load.shed_after_s),
            "latency_s": percentiles(load.latencies_s),
            "good": good(load.latencies_s, objective_s, seconds),
        }
        console.print(f"{share} of capacity: {loads[str(share)]['good']}")
    return {"best_of": GOODPUT_BEST_OF, "objective_s": objective_s, "capacity_per_s": capacity, "loads": loads}


async def measure(*, short: bool, ray: bool, prices: Prices) -> dict[str, Any]:
    requests, seconds = (3, 10.0) if short else (10, 60.0)
    flags = ("--max-model-len", "2048", *(("--ray",) if ray else ()))
    async with nbest_serve(*flags) as served:
        client, processes = served.client, ServerProcesses(served.pid)

        async def sweep(cases: Sequence[Case]) -> list[Any]:
            num_requests = max(requests, 2 * max(case.at_once for case in cases))
            return [await closed_loop(client, processes, case, num_requests, prices) for case in cases]

        figures: dict[str, Any] = {"candidates": await sweep([Case(best_of=n) for n in N[: 5 if short else None]])}
        if not ray:
            figures |= {
                "concurrency": await sweep([Case(at_once=at_once) for at_once in (1, 2, 4, 8)]),
                "prompt": await sweep([Case(prompt_sentences=sentences) for sentences in (2, 9, 40, 100)]),
                "length": await sweep([Case(max_tokens=max_tokens) for max_tokens in (16, 64, 256)]),
                "goodput": await goodput(client, processes, prices, seconds),
            }
    return {"provenance": provenance(flags={"server": " ".join(flags)}), "prices": asdict(prices), **figures}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="send few requests and only print the result, as a trial")
    parser.add_argument("--ray", action="store_true", help="serve on Ray, and run the sweep over candidates alone")
    Prices.add_flags(parser)
    arguments = parser.parse_args()
    prices = Prices.from_flags(arguments)
    result = asyncio.run(measure(short=arguments.short, ray=arguments.ray, prices=prices))
    if arguments.short:
        print(json.dumps(result))
    else:
        write_result("latency_ray" if arguments.ray else "latency", result)


if __name__ == "__main__":
    main()
