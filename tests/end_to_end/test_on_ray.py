"""`nbest serve --ray` with the real engine and reward model gives the same answers and leaves no process behind."""

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest

from server.config import flag_of
from tests.end_to_end.process import ServeProcess, is_running, nbest_serve
from tests.end_to_end.served import START_TIMEOUT_S, Served, candidates_in_flight
from tests.end_to_end.test_reliability import post_all
from tests.support.waiting import eventually

pytestmark = [pytest.mark.engine, pytest.mark.timeout(START_TIMEOUT_S + 120)]

MODEL = "smollm2-135m-instruct"
GENERATOR_REPLICA = "ray::ServeReplica:nbest:generator"
COPIED_SETTINGS = ("dtype", "reward_dtype", "max_model_len", "kv_cache_gib", "max_num_seqs", "max_best_of")
"""Settings that influence the candidates of a seed."""


@pytest.fixture(scope="module")
def process(served: Served) -> Iterator[ServeProcess]:
    """A running server; at the end SIGTERM must stop it and all Ray processes with exit code 0."""
    flags = [word for name in COPIED_SETTINGS for word in (flag_of(name), str(getattr(served.settings, name)))]
    with nbest_serve("--ray", *flags) as process:
        yield process
        assert process.stop() == (0, [])
        assert "Ready after" in process.log_text()
        assert "Traceback" not in process.log_text()


@pytest.fixture
def url(process: ServeProcess) -> str:
    return process.url


def complete(url: str, **fields: Any) -> Any:
    extension = {"best_of": 6, "nbest": {"return_candidates": True}}
    with openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as client:
        return client.completions.create(
            model=MODEL, prompt="This film is", max_tokens=12, extra_body=extension, **fields
        )


def test_a_seed_gives_the_same_candidates_rewards_and_winner_as_in_one_process(url: str, served: Served) -> None:
    in_process, on_ray = complete(served.url, seed=7), complete(url, seed=7)
    candidates, expected = on_ray.nbest["candidates"], in_process.nbest["candidates"]
    assert [candidate["text"] for candidate in candidates] == [candidate["text"] for candidate in expected]
    rewards = [candidate["reward"] for candidate in expected]
    assert [candidate["reward"] for candidate in candidates] == pytest.approx(rewards, abs=1e-4)
    best = max(candidates, key=lambda candidate: candidate["reward"])
    assert on_ray.choices[0].text == best["text"] == in_process.choices[0].text
    assert on_ray.usage == in_process.usage


def test_tokens_are_streamed(url: str) -> None:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as client:
        chunks = list(
            client.chat.completions.create(
                model=MODEL,
                messages=[{"role": "user", "content": "Write one sentence about a film you saw."}],
                max_tokens=8,
                stream=True,
                extra_body={"best_of": 1},
            )
        )
    assert len([chunk for chunk in chunks if chunk.choices[0].delta.content]) > 1
    assert chunks[-1].choices[0].finish_reason in {"stop", "length"}


def test_scoring_batches_are_counted_in_the_scorer_replica(url: str) -> None:
    complete(url)
    exposition = httpx.get(f"{url}/metrics").text
    counts = {
        line.partition('replica="')[2].partition("-")[0]: float(line.split()[-1])
        for line in exposition.splitlines()
        if line.startswith("nbest_score_batch_sequences_count")
    }
    assert counts["scorer"] >= 1
    assert counts["router"] == 0


@pytest.mark.timeout(600)  # an engine starts during the test
def test_a_generator_killed_during_twenty_requests_is_replaced_and_loses_none(process: ServeProcess) -> None:
    assert eventually(process.is_ready, START_TIMEOUT_S)
    engine, replica = process.engine(), process.child_named(GENERATOR_REPLICA)
    assert replica is not None
    engine_processes = [engine, *engine.children(recursive=True)]
    body = {"model": MODEL, "prompt": "Once", "best_of": 2, "max_tokens": 100}
    with ThreadPoolExecutor(1) as load:
        pending = load.submit(asyncio.run, post_all(process.url, [body] * 20, timeout_s=START_TIMEOUT_S))
        assert eventually(lambda: candidates_in_flight(process.url) > 30)
        replica.kill()
        assert eventually(lambda: not process.is_ready(), 60)
        assert process.is_healthy()
        has_engine_ended = eventually(lambda: not any(map(is_running, engine_processes)), 60)
        assert has_engine_ended, "the engine outlives the process that started it"
        assert eventually(process.is_ready, START_TIMEOUT_S)
        replies = pending.result()
    assert [reply.status_code for reply in replies if isinstance(reply, httpx.Response)] == [200] * 20
    assert candidates_in_flight(process.url) == 0
