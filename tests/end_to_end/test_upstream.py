"""One nbest server as the upstream of another, which uses it as any OpenAI-compatible server."""

from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from server.config import Settings
from tests.end_to_end.served import Served, serve
from tests.end_to_end.test_best_of_n import FILM, MODEL, complete, texts_by_index
from tests.support.waiting import eventually

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def front(served: Served) -> Iterator[Served]:
    settings = Settings(generator="openai", base_url=f"{served.url}/v1", model=MODEL)
    with serve(settings) as front:
        yield front


@pytest.fixture
def front_client(front: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{front.url}/v1", api_key="unused", max_retries=0) as client:
        yield client


def test_the_winner_has_the_largest_reward_of_the_upstreams_choices(front_client: openai.OpenAI) -> None:
    reply = complete(front_client, best_of=4, seed=5)
    candidates = reply.nbest["candidates"]
    assert sorted(candidate["index"] for candidate in candidates) == [0, 1, 2, 3]
    assert reply.choices[0].reward == max(candidate["reward"] for candidate in candidates)
    assert reply.usage.completion_tokens == sum(candidate["num_tokens"] for candidate in candidates)
    assert all(candidate["cumulative_logprob"] < 0 for candidate in candidates)


def test_upstream_and_embedded_engine_sample_the_same_texts(front_client: openai.OpenAI, client: openai.OpenAI) -> None:
    upstream, embedded = (complete(caller, best_of=4, seed=9) for caller in (front_client, client))
    assert set(texts_by_index(upstream).values()) == set(texts_by_index(embedded).values())


def test_chat_is_streamed_from_the_upstream(front_client: openai.OpenAI) -> None:
    chunks: list[Any] = list(
        front_client.chat.completions.create(
            model=MODEL, messages=FILM, max_tokens=8, stream=True, extra_body={"best_of": 1}
        )
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


def test_an_error_of_the_upstream_reaches_the_client(front_client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="context is 1024"):
        front_client.completions.create(model=MODEL, prompt="word " * 2000)


def test_a_disconnect_stops_the_upstream_too(front: Served, served: Served) -> None:
    body = {"model": MODEL, "prompt": "Once", "best_of": 4, "max_tokens": 900, "logit_bias": {"2": -100, "0": -100}}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{front.url}/v1/completions", json=body, timeout=2)
    assert eventually(lambda: served.generator.unfinished == 0, 5)
