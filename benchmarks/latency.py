"""Latency and cost against N: `nbest serve` as a process, asked over HTTP by streaming clients.

    candidates     best_of = 1, 2, 4, … 64, one request at a time
    concurrency    best_of = 16, several requests at a time
    prompt         best_of = 16, prompts of different lengths
    length         best_of = 16, candidates of different lengths
    goodput        best_of = 4 at Poisson times that wait for no answer: answers a second that came within an objective
                   of three times the median of a request alone

Told are percentiles of the time to the first and to the last token, tokens, CPU-seconds of all processes of the server
(user and system), their resident memory at its highest, and the price. A request costs what the machine costs for as
long as the request had it to itself (with k at a time, a k-th), or what its tokens cost; both prices are flags.

    python -m benchmarks.latency [--short] [--ray] [--price-per-hour 0.1] [--price-per-million 0 0 0]

Writes benchmarks/results/latency.json, with --ray latency_ray.json. Of ten requests the 99th percentile is all but the
slowest one.
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
from benchmarks.stats import hand_in, percentiles

MODEL = "smollm2-135m-instruct"
N = (1, 2, 4, 8, 16, 32, 64)
WORDS_A_SENTENCE = "The crowd at the festival cheered for every scene of it. "
"""About twelve tokens."""
OBJECTIVE_OF_MEDIAN = 3.0
GOODPUT_BEST_OF = 4
LOADS = (0.5, 0.8, 1.0, 1.3)
"""Requests a second, of what the server answers with eight at a time."""
MEMORY_EVERY_S = 0.2

console = Console(stderr=True)


@dataclass(frozen=True, slots=True)
class Case:
    """One kind of request, so many of them at a time."""

    best_of: int = 16
    prompt_sentences: int = 9
    max_tokens: int = 64
    at_once: int = 1


@dataclass(slots=True)
class Answers:
    """What was measured of the requests of a case."""

    first_token_s: list[float] = field(default_factory=list)
    total_s: list[float] = field(default_factory=list)
    prompt_tokens: list[int] = field(default_factory=list)
    generated_tokens: list[int] = field(default_factory=list)
    scored_tokens: list[int] = field(default_factory=list)


class Machine:
    """The processes of a server: what they have computed, and what they hold."""

    def __init__(self, pid: int) -> None:
        self._parent = psutil.Process(pid)
        self.peak_rss = 0

    def _all(self) -> list[psutil.Process]:
        return [self._parent, *self._parent.children(recursive=True)]

    def cpu_s(self) -> float:
        """User and system, since they began."""
        total = 0.0
        for one in self._all():
            try:
                spent = one.cpu_times()
            except psutil.NoSuchProcess:
                continue
            total += spent.user + spent.system
        return total

    async def watch(self) -> None:
        """Keeps the highest of their resident memory, until cancelled."""
        while True:
            rss = 0
            for one in self._all():
                try:
                    rss += one.memory_info().rss
                except psutil.NoSuchProcess:
                    continue
            self.peak_rss = max(self.peak_rss, rss)
            await asyncio.sleep(MEMORY_EVERY_S)


def body(case: Case, number: int) -> dict[str, Any]:
    """Every request has an opening of its own at its end, so that only what they share is in the prefix cache."""
    prompt = WORDS_A_SENTENCE * case.prompt_sentences + OPENINGS[number % len(OPENINGS)]
    return {
        "model": MODEL,
        "prompt": prompt,
        "best_of": case.best_of,
        "max_tokens": case.max_tokens,
        "seed": 10_000 * number,
    }


async def ask(client: httpx.AsyncClient, asked: dict[str, Any], answers: Answers) -> None:
    begun_s, first_s = time.perf_counter(), 0.0
    streaming = {**asked, "stream": True, "stream_options": {"include_usage": True}}
    async with client.stream("POST", "/v1/completions", json=streaming) as reply:
        reply.raise_for_status()
        async for line in reply.aiter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line.removeprefix("data: "))
            if not first_s and chunk["choices"] and chunk["choices"][0]["text"]:
                first_s = time.perf_counter()
            account = chunk.get("nbest") or {}
            if "generated_tokens" in account:
                answers.generated_tokens.append(account["generated_tokens"])
                answers.scored_tokens.append(account["scored_tokens"])
            if chunk.get("usage"):
                answers.prompt_tokens.append(chunk["usage"]["prompt_tokens"])
    ended_s = time.perf_counter()
    answers.first_token_s.append((first_s or ended_s) - begun_s)
    answers.total_s.append(ended_s - begun_s)


async def closed_loop(client: httpx.AsyncClient, machine: Machine, case: Case, requests: int, prices: Prices) -> Any:
    """So many requests, `at_once` of them under way at any time; as many before them warm up."""
    for number in range(case.at_once):
        await ask(client, body(case, requests + number), Answers())
    left, answers = list(range(requests)), Answers()

    async def keep_asking() -> None:
        while left:
            await ask(client, body(case, left.pop(0)), answers)

    machine.peak_rss = 0
    watching = asyncio.create_task(machine.watch())
    cpu_s, begun_s = machine.cpu_s(), time.perf_counter()
    await asyncio.gather(*(keep_asking() for _ in range(case.at_once)))
    took_s, cpu_s = time.perf_counter() - begun_s, machine.cpu_s() - cpu_s
    watching.cancel()
    found = summary(answers, took_s, prices) | {
        "cpu_s_a_request": cpu_s / requests,
        "peak_rss_bytes": machine.peak_rss,
    }
    console.print(f"{case}: {found['total_s']['p50']:.2f} s, {found['tokens_per_s']:.0f} tokens/s")
    return asdict(case) | found


def summary(answers: Answers, took_s: float, prices: Prices) -> dict[str, Any]:
    """Of the requests of a case, which took so long together."""
    requests = len(answers.total_s)
    means = [
        statistics.fmean(tokens) for tokens in (answers.prompt_tokens, answers.generated_tokens, answers.scored_tokens)
    ]
    return {
        "requests": requests,
        "first_token_s": percentiles(answers.first_token_s),
        "total_s": percentiles(answers.total_s),
        "requests_per_s": requests / took_s,
        "tokens_per_s": sum(answers.generated_tokens) / took_s,
        "prompt_tokens": means[0],
        "generated_tokens": means[1],
        "scored_tokens": means[2],
        "price": prices.of(took_s / requests, *means),
    }


def good(latencies_s: Sequence[float], objective_s: float, seconds: float) -> dict[str, float]:
    """Answers a second within the objective, and their share of those that were answered."""
    in_time = sum(one <= objective_s for one in latencies_s)
    return {"per_s": in_time / seconds, "share": in_time / len(latencies_s) if latencies_s else 0.0}


async def goodput(client: httpx.AsyncClient, machine: Machine, prices: Prices, seconds: float) -> dict[str, Any]:
    case = Case(best_of=GOODPUT_BEST_OF)
    alone = await closed_loop(client, machine, case, 6, prices)
    full = await closed_loop(client, machine, Case(best_of=GOODPUT_BEST_OF, at_once=8), 32, prices)
    objective_s, capacity = OBJECTIVE_OF_MEDIAN * alone["total_s"]["p50"], full["requests_per_s"]
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
        client, machine = served.client, Machine(served.pid)

        async def sweep(cases: Sequence[Case]) -> list[Any]:
            asked = max(requests, 2 * max(case.at_once for case in cases))
            return [await closed_loop(client, machine, case, asked, prices) for case in cases]

        found: dict[str, Any] = {"candidates": await sweep([Case(best_of=n) for n in N[: 5 if short else None]])}
        if not ray:
            found |= {
                "concurrency": await sweep([Case(at_once=some) for some in (1, 2, 4, 8)]),
                "prompt": await sweep([Case(prompt_sentences=some) for some in (2, 9, 40, 100)]),
                "length": await sweep([Case(max_tokens=some) for some in (16, 64, 256)]),
                "goodput": await goodput(client, machine, prices, seconds),
            }
    return {"provenance": provenance(flags={"server": " ".join(flags)}), "prices": asdict(prices), **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="few requests, to see it work; only printed")
    parser.add_argument("--ray", action="store_true", help="on Ray, and the first sweep alone")
    Prices.add_flags(parser)
    given = parser.parse_args()
    result = asyncio.run(measure(short=given.short, ray=given.ray, prices=Prices.given(given)))
    if given.short:
        print(json.dumps(result))
    else:
        hand_in("latency_ray" if given.ray else "latency", result)


if __name__ == "__main__":
    main()
