"""The faults of a real server: its engine is killed under load, its clients hang up, it is told to stop."""

import asyncio
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.end_to_end.process import ServeProcess, nbest_serve
from tests.end_to_end.served import START_TIMEOUT_S, Served
from tests.end_to_end.test_best_of_n import MODEL
from tests.support.waiting import eventually

pytestmark = pytest.mark.engine

ENDLESS = {"model": MODEL, "prompt": "Once", "max_tokens": 900, "logit_bias": {"2": -100, "0": -100}}
"""A minute's work for the engine: the tokens that would end it are never drawn."""


async def ask_all(url: str, bodies: list[dict[str, Any]], timeout_s: float) -> list[httpx.Response | Exception]:
    """All at once, each on a connection of its own."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=timeout_s, limits=limits) as client:
        asking = (client.post("/v1/completions", json=body) for body in bodies)
        replies: list[Any] = await asyncio.gather(*asking, return_exceptions=True)
        return replies


def test_nothing_is_left_of_a_hundred_requests_that_hung_up(served: Served) -> None:
    before = served.generator.cancelled_total
    bodies: list[dict[str, Any]] = [ENDLESS | {"best_of": 2, "stream": bool(number % 2)} for number in range(20)]
    for _ in range(5):
        replies = asyncio.run(ask_all(served.url, bodies, timeout_s=1))
        assert {type(reply) for reply in replies} == {httpx.ReadTimeout}
    assert eventually(lambda: served.generator.unfinished == 0)
    assert served.generator.cancelled_total > before
    assert eventually(lambda: served.generator.load.running == served.generator.load.waiting == 0)
    assert served.metric("nbest_candidates_in_flight") == 0


@pytest.fixture(scope="module")
def process() -> Iterator[ServeProcess]:
    """Its engine's worker has a process of its own, as on several devices: there is the most to be left behind."""
    flags = ("--max-model-len", "1024", "--kv-cache-gib", "1", "--drain-s", "60")
    with nbest_serve(*flags, VLLM_CPU_OMP_THREADS_BIND="auto") as process:
        yield process


@pytest.mark.timeout(600)  # an engine starts twice in it
def test_an_engine_killed_under_twenty_requests_is_replaced_and_loses_none(process: ServeProcess) -> None:
    engine, segments = process.engine(), process.shared_memory()
    parts = [engine, *engine.children(recursive=True)]
    assert segments
    body = {"model": MODEL, "prompt": "Once", "best_of": 2, "max_tokens": 100, "nbest": {"return_candidates": True}}
    with ThreadPoolExecutor(1) as load:
        asking = load.submit(asyncio.run, ask_all(process.url, [body] * 20, timeout_s=START_TIMEOUT_S))
        assert eventually(lambda: process.metric("nbest_candidates_in_flight") > 30)
        engine.kill()
        assert eventually(lambda: not process.is_ready(), 60)
        refused = httpx.post(f"{process.url}/v1/completions", json=body, timeout=60)
        assert (refused.status_code, refused.headers["Retry-After"]) == (503, "5")
        assert process.is_healthy()
        assert eventually(process.is_ready, START_TIMEOUT_S)
        replies = asking.result()
    assert [reply.status_code for reply in replies if isinstance(reply, httpx.Response)] == [200] * 20
    for reply in replies:
        assert isinstance(reply, httpx.Response)
        told = reply.json()
        candidates = told["nbest"]["candidates"]
        assert sorted(one["index"] for one in candidates) == [0, 1]
        assert told["choices"][0]["reward"] == max(one["reward"] for one in candidates)
        assert told["usage"]["completion_tokens"] == sum(one["num_tokens"] for one in candidates)
    assert process.metric("nbest_engine_restarts_total") == 1
    assert process.metric("nbest_candidates_in_flight") == 0
    assert not psutil.wait_procs(parts, timeout=10)[1]
    assert not [segment for segment in segments if Path(segment).exists()]


def test_sigterm_lets_a_request_finish_and_leaves_nothing(process: ServeProcess) -> None:
    body = ENDLESS | {"best_of": 1, "max_tokens": 100}
    with ThreadPoolExecutor(1) as asking:
        answer = asking.submit(httpx.post, f"{process.url}/v1/completions", json=body, timeout=120)
        assert eventually(lambda: process.metric("nbest_candidates_in_flight") == 1)
        code, left = process.stop(signal.SIGTERM)
        assert answer.result().json()["usage"]["completion_tokens"] == 100
    assert (code, left) == (0, []), process.said()
