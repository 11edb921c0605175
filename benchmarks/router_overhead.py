"""CPU milliseconds of the router for a request, with a scripted generator and a scripted scorer that answer at once.

A server process (uvicorn, uvloop, httptools) answers chat completions that a client in this process sends over a
kept-alive connection, one at a time. The server reads its own CPU clock (time.process_time, user and system, all
threads) before and after each batch of requests, so the client's work is not included. The cost of the scripted
generator and scorer, about one task for each candidate, is included.

    python -m benchmarks.router_overhead

Writes benchmarks/results/router_overhead.json; the last line of output is the same JSON.
"""

import argparse
import multiprocessing
import socket
import statistics
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import uvicorn

from benchmarks.provenance import provenance
from benchmarks.stats import write_result
from server.app import create_app
from server.config import Settings
from server.observability.metrics import Metrics
from server.pipeline.best_of_n import BestOfN
from tests.support.doubles import ScriptedGenerator, ScriptedScorer

TEXT = "It is a warm, unhurried film that trusts its actors, and they repay it in every scene they share."
PROMPT = "Write one sentence about a film you saw. " * 8
CASES: dict[str, dict[str, Any]] = {
    "n1": {"best_of": 1},
    "n16": {"best_of": 16},
    "n1_stream": {"best_of": 1, "stream": True},
    "n16_candidates": {"best_of": 16, "nbest": {"return_candidates": True}},
}


def serve(listener: socket.socket) -> None:
    """The server process: the shipped app with an additional route that returns the CPU clock."""

    @asynccontextmanager
    async def start() -> AsyncIterator[BestOfN]:
        scorer = ScriptedScorer({TEXT: 1.0})
        yield BestOfN(ScriptedGenerator([TEXT]), {scorer.name: scorer})

    async def cpu_s() -> float:
        return time.process_time()

    app = create_app(start, Settings(), Metrics())
    app.add_api_route("/cpu_s", cpu_s)
    config = uvicorn.Config(app, loop="uvloop", http="httptools", ws="none", access_log=False, log_level="warning")
    uvicorn.Server(config).run(sockets=[listener])


def measure(client: httpx.Client, case: dict[str, Any], num_requests: int) -> float:
    """CPU milliseconds of the server for one request, averaged over `num_requests`."""
    body = {"model": "scripted", "messages": [{"role": "user", "content": PROMPT}], **case}
    before_s = client.get("/cpu_s").json()
    for _ in range(num_requests):
        client.post("/v1/chat/completions", json=body).raise_for_status()
    return 1000 * float(client.get("/cpu_s").json() - before_s) / num_requests


def summary(cpu_ms: list[float]) -> dict[str, float]:
    """Mean and spread over the repeats; the minimum is the repeat with the least interference by other programs."""
    spread = {
        "mean": statistics.mean(cpu_ms),
        "stdev": statistics.stdev(cpu_ms),
        "min": min(cpu_ms),
        "max": max(cpu_ms),
    }
    return {name: round(value, 3) for name, value in spread.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=500, help="requests in one repeat")
    parser.add_argument("--repeats", type=int, default=7)
    flags = parser.parse_args()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = multiprocessing.get_context("spawn").Process(target=serve, args=(listener,), daemon=True)
        server.start()
        with httpx.Client(base_url=f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=60) as client:
            while client.get("/ready").is_error:
                time.sleep(0.01)
            cpu_ms = {}
            for name, case in CASES.items():
                measure(client, case, flags.requests // 5)  # warm up
                cpu_ms[name] = summary([measure(client, case, flags.requests) for _ in range(flags.repeats)])
                print(f"{name:>15}: {cpu_ms[name]} ms of CPU a request")
        server.terminate()
        server.join()

    result = {"cpu_ms_per_request": cpu_ms, "requests": CASES, "provenance": provenance(vars(flags))}
    write_result("router_overhead", result)


if __name__ == "__main__":
    main()
