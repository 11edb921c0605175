"""Outcomes of requests under three faults: the measured column of docs/reliability.md.

Each fault is measured on `nbest serve`, or on the same server in this process, with the default models:

- killed: the engine's process is killed with 20 requests in flight. Measured: lost requests, seconds until `/ready`.
- cancelled: the clients of 1,000 requests disconnect while the engine generates. Measured: what remains of the requests
  in the in-flight gauge, in the engine and in memory, and the seconds until the engine has no request left.
- stopped: SIGTERM with requests in flight. Measured: answered requests, the status of new requests, the exit code,
  remaining processes.

    python -m benchmarks.reliability [killed] [cancelled] [stopped]

Writes benchmarks/results/reliability.json; faults that are not named keep their figures there.
"""

import argparse
import asyncio
import collections
import json
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import psutil
from rich.console import Console
from rich.progress import track

from benchmarks.provenance import RESULTS, provenance
from benchmarks.stats import write_result
from server.config import Settings
from tests.end_to_end.process import nbest_serve
from tests.end_to_end.served import START_TIMEOUT_S, Served, serve
from tests.support.waiting import eventually

MODEL = "smollm2-135m-instruct"
WORK = {"model": MODEL, "prompt": "I saw this film and", "best_of": 2, "max_tokens": 100}
ENDLESS = WORK | {"best_of": 4, "max_tokens": 900, "logit_bias": {"2": -100, "0": -100}}
"""EOS is never sampled, so the engine would generate for a minute."""
FLAGS = ("--max-model-len", "1024", "--kv-cache-gib", "1", "--drain-s", "60")
TOGETHER = 20
"""Requests in flight at a time."""


async def send_all(url: str, bodies: list[dict[str, Any]], timeout_s: float) -> list[int | str]:
    """Sends all requests at once; returns each one's status, or the name of its transport error."""

    async def status(client: httpx.AsyncClient, body: dict[str, Any]) -> int | str:
        try:
            return (await client.post("/v1/completions", json=body)).status_code
        except httpx.TransportError as error:
            return type(error).__name__

    async with httpx.AsyncClient(base_url=url, timeout=timeout_s, limits=httpx.Limits(max_connections=None)) as client:
        return list(await asyncio.gather(*(status(client, body) for body in bodies)))


def counted(statuses: list[int | str]) -> dict[str, int]:
    return {str(status): count for status, count in collections.Counter(statuses).items()}


def killed(rounds: int) -> dict[str, Any]:
    """Kills the engine under load `rounds` times, 60 s apart, so that each failure counts as the engine's first."""
    recovery_s: list[float] = []
    statuses: list[int | str] = []
    healthy = []
    with nbest_serve(*FLAGS) as served, ThreadPoolExecutor(1) as load:
        for number in range(rounds):
            if number:
                time.sleep(60)  # `RestartPolicy.stable_after_s`
            replies = load.submit(asyncio.run, send_all(served.url, [WORK] * TOGETHER, START_TIMEOUT_S))
            assert eventually(lambda: served.metric("nbest_candidates_in_flight") > TOGETHER, 60)
            served.engine().kill()
            killed_s = time.perf_counter()
            assert eventually(lambda: not served.is_ready(), 60)
            healthy.append(served.is_healthy())
            assert eventually(served.is_ready, START_TIMEOUT_S)
            recovery_s.append(time.perf_counter() - killed_s)
            statuses += replies.result()
        return {
            "in_flight": TOGETHER,
            "rounds": rounds,
            "statuses": counted(statuses),
            "lost": sum(status not in {200, 503} for status in statuses),
            "recovery_s": {"median": statistics.median(recovery_s), "low": min(recovery_s), "high": max(recovery_s)},
            "health_stayed_up": all(healthy),
            "engine_restarts": served.metric("nbest_engine_restarts_total"),
            "in_flight_after": served.metric("nbest_candidates_in_flight"),
        }


def cancelled(num_requests: int) -> dict[str, Any]:
    """Requests whose clients disconnect, `TOGETHER` at a time; the first tenth warms the process up."""
    idle_s: list[float] = []
    rss_mib: list[float] = []
    settings = Settings(max_model_len=1024, kv_cache_gib=1)
    with serve(settings) as served:
        statuses: list[int | str] = []
        for _ in track(range(num_requests // TOGETHER), "Disconnecting", console=Console(stderr=True)):
            statuses += asyncio.run(send_all(served.url, [ENDLESS] * TOGETHER, timeout_s=1.0))
            disconnect_s = time.perf_counter()
            assert eventually(lambda: is_idle(served), 60)
            idle_s.append(time.perf_counter() - disconnect_s)
            rss_mib.append(psutil.Process().memory_info().rss / 2**20)
        warm_up = max(len(rss_mib) // 10, 1)
        return {
            "requests": num_requests,
            "candidates_each": ENDLESS["best_of"],
            "statuses": counted(statuses),
            "engine_idle_after_s": {"median": statistics.median(idle_s), "high": max(idle_s)},
            "cancelled_in_the_engine": served.generator.cancelled_total,
            "unfinished_in_the_engine": served.generator.unfinished,
            "in_flight_after": served.metric("nbest_candidates_in_flight"),
            "memory": {
                "after_warm_up_mib": rss_mib[warm_up],
                "at_the_end_mib": rss_mib[-1],
                "growth": rss_mib[-1] / rss_mib[warm_up] - 1,
            },
        }


def is_idle(served: Served) -> bool:
    load = served.generator.load
    return served.generator.unfinished == load.running == load.waiting == 0


def stopped() -> dict[str, Any]:
    """SIGTERM with requests in flight."""
    with nbest_serve(*FLAGS) as served, ThreadPoolExecutor(2) as load:
        replies = load.submit(asyncio.run, send_all(served.url, [WORK] * TOGETHER, 120))
        assert eventually(lambda: served.metric("nbest_candidates_in_flight") > TOGETHER, 60)
        start_s = time.perf_counter()
        stopping = load.submit(served.stop)
        assert eventually(lambda: not served.is_ready(), 60)
        refused = httpx.post(f"{served.url}/v1/completions", json=WORK, timeout=60)
        code, processes = stopping.result()
        return {
            "in_flight": TOGETHER,
            "statuses": counted(replies.result()),
            "new_requests_get": refused.status_code,
            "seconds": time.perf_counter() - start_s,
            "exit_code": code,
            "processes_left": len(processes),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("faults", nargs="*", help="killed, cancelled, stopped; default: all of them")
    parser.add_argument("--rounds", type=int, default=3, help="number of times the engine is killed")
    parser.add_argument("--requests", type=int, default=1000, help="number of requests whose clients disconnect")
    flags = parser.parse_args()
    measures = {
        "killed": lambda: killed(flags.rounds),
        "cancelled": lambda: cancelled(flags.requests),
        "stopped": stopped,
    }
    path = RESULTS / "reliability.json"
    result = json.loads(path.read_text()) if path.exists() else {}
    for fault in flags.faults or measures:
        result[fault] = measures[fault]() | {"provenance": provenance(flags=vars(flags))}
    result["provenance"] = provenance(flags=vars(flags))
    write_result("reliability", result)


if __name__ == "__main__":
    main()
