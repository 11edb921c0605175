"""Faults of a real server: its engine is killed under load, its clients disconnect, it is stopped by a signal."""

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
"""Takes the engine a minute: the bias keeps it from sampling the tokens that end a text."""


async def post_all(url: str, bodies: list[dict[str, Any]], timeout_s: float) -> list[httpx.Response | Exception]:
    """Sends all requests at once, each on its own connection."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=timeout_s, limits=limits) as client:
        requests = (client.post("/v1/completions", json=body) for body in bodies)
        replies: list[Any] = await asyncio.gather(*requests, return_exceptions=True)
        return replies


def test_a_hundred_disconnected_requests_leave_nothing_running(served: Served) -> None:
    before = served.generator.cancelled_total
    bodies: list[dict[str, Any]] = [ENDLESS | {"best_of": 2, "stream": bool(number % 2)} for number in range(20)]
    for _ in range(5):
        replies = asyncio.run(post_all(served.url, bodies, timeout_s=1))
        assert {type(reply) for reply in replies} == {httpx.ReadTimeout}
    assert eventually(lambda: served.generator.unfinished == 0)
    assert served.generator.cancelled_total > before
    assert eventually(lambda: served.generator.load.running == served.generator.load.waiting == 0)
    assert served.metric("nbest_candidates_in_flight") == 0


@pytest.fixture(scope="module")
def process() -> Iterator[ServeProcess]:
    """A server whose engine has a separate worker process, as on several devices: the most that could be left over."""
    flags = ("--max-model-len", "1024", "--kv-cache-gib", "1", "--drain-s", "60")
    with nbest_serve(*flags, VLLM_CPU_OMP_THREADS_BIND="auto") as process:
        yield process


@pytest.mark.timeout(600)  # an engine starts twice during the test
def test_an_engine_killed_during_twenty_requests_is_replaced_and_loses_none(process: ServeProcess) -> None:
    engine, segments = process.engine(), process.shared_memory()
    engine_processes = [engine, *engine.children(recursive=True)]
    assert segments
    body = {"model": MODEL, "prompt": "Once", "best_of": 2, "max_tokens": 100, "nbest": {"return_candidates": True}}
    with ThreadPoolExecutor(1) as load:
        pending = load.submit(asyncio.run, post_all(process.url, [body] * 20, timeout_s=START_TIMEOUT_S))
        assert eventually(lambda: process.metric("nbest_candidates_in_flight") > 30)
        engine.kill()
        assert eventually(lambda: not process.is_ready(), 60)
        refused = httpx.post(f"{process.url}/v1/completions", json=body, timeout=60)
        assert (refused.status_code, refused.headers["Retry-After"]) == (503, "5")
        assert process.is_healthy()
        assert eventually(process.is_ready, START_TIMEOUT_S)
        replies = pending.result()
    assert [reply.status_code for reply in replies if isinstance(reply, httpx.Response)] == [200] * 20
    for reply in replies:
        assert isinstance(reply, httpx.Response)
        body = reply.json()
        candidates = body["nbest"]["candidates"]
        assert sorted(candidate["index"] for candidate in candidates) == [0, 1]
        assert body["choices"][0]["reward"] == max(candidate["reward"] for candidate in candidates)
        assert body["usage"]["completion_tokens"] == sum(candidate["num_tokens"] for candidate in candidates)
    assert process.metric("nbest_engine_restarts_total") == 1
    assert process.metric("nbest_candidates_in_flight") == 0
    assert not psutil.wait_procs(engine_processes, timeout=10)[1]
    assert not [segment for segment in segments if Path(segment).exists()]


def test_sigterm_lets_a_request_finish_and_leaves_no_process(process: ServeProcess) -> None:
    body = ENDLESS | {"best_of": 1, "max_tokens": 100}
    with ThreadPoolExecutor(1) as load:
        pending = load.submit(httpx.post, f"{process.url}/v1/completions", json=body, timeout=120)
        assert eventually(lambda: process.metric("nbest_candidates_in_flight") == 1)
        code, left = process.stop(signal.SIGTERM)
        assert pending.result().json()["usage"]["completion_tokens"] == 100
    assert (code, left) == (0, []), process.log_text()
