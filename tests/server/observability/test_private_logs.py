"""No log line contains text of a prompt or a completion, at any level, however the request ends."""

import asyncio
import contextlib
import io
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import httpx2
import openai
import pytest

from reranker.candidate import Message, Prompt
from reranker.scorers.base import ScoringError
from server.errors import ContextLengthError, NbestError, OverloadedError
from server.generation.base import SamplingParams
from server.generation.openai_upstream import OpenAIGenerator
from server.http import api_keys
from server.observability import logs
from server.pipeline.best_of_n import BestOfN
from tests.support.doubles import ScriptedGenerator, ScriptedScorer
from tests.support.serving import address_of, app_over, pipeline

CHAT = "/v1/chat/completions"
PROMPT = "pistachio"
COMPLETION = "marzipan"
BODY: dict[str, Any] = {"model": "scripted", "messages": [{"role": "user", "content": PROMPT}], "best_of": 1}


class QuotingScorer(ScriptedScorer):
    """A scorer whose error message quotes the texts it read."""

    async def score(self, *args: Any) -> Any:
        raise ScoringError(f"no idea what {COMPLETION} is worth after {PROMPT}")


class BrokenPipeline(BestOfN):
    """A pipeline with a bug."""

    async def run(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("a bug")


@pytest.fixture
def logged() -> Iterator[io.StringIO]:
    """The log of the server at level debug; after the test it must contain neither text."""
    written, root, openai_logger = io.StringIO(), logging.getLogger(), logging.getLogger("openai")
    levels, handlers = [(logger, logger.level) for logger in (root, openai_logger)], root.handlers[:]
    logs.configure("debug", "text", written)
    yield written
    root.handlers[:] = handlers
    for logger, level in levels:
        logger.setLevel(level)
    assert written.getvalue(), "nothing was logged at all"
    assert PROMPT not in written.getvalue()
    assert COMPLETION not in written.getvalue()


def generator(**options: Any) -> ScriptedGenerator:
    return ScriptedGenerator([COMPLETION], **options)


@pytest.mark.parametrize(
    ("served", "fields", "status"),
    [
        (pipeline(generator()), {}, 200),
        (pipeline(generator()), {"logprobs": True, "nbest": {"return_candidates": True}}, 200),
        (pipeline(generator()), {"temperature": PROMPT}, 400),
        (pipeline(generator()), {PROMPT: PROMPT}, 400),
        (pipeline(generator()), {"messages": PROMPT}, 400),
        (pipeline(generator()), {"messages": [{"role": PROMPT, "content": PROMPT}]}, 400),
        (pipeline(generator()), {"nbest": {"strategy": "majority", "selection": {"answer_regex": f"({PROMPT}"}}}, 400),
        (pipeline(generator()), {"model": PROMPT}, 404),
        (pipeline(generator()), {"messages": [{"role": "user", "content": PROMPT * 1000}]}, 413),
        (pipeline(generator(refusal=ContextLengthError(f"{PROMPT} is too long."))), {}, 400),
        (pipeline(generator(refusal=OverloadedError(f"No {COMPLETION} now.", retry_after_s=1))), {}, 429),
        (pipeline(ScriptedGenerator([None])), {}, 503),
        (pipeline(generator(), ScriptedScorer(fails=True)), {}, 503),
        (pipeline(generator(), QuotingScorer()), {}, 503),
        (pipeline(generator(), QuotingScorer()), {"nbest": {"on_reward_failure": "first"}}, 200),
        (pipeline(generator(delays_s={0: 60})), {"nbest": {"deadline_s": 0.01}}, 504),
        (BrokenPipeline(generator(), {"r": ScriptedScorer()}), {}, 500),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_no_text_is_logged_for_answers_and_failures(
    served: BestOfN, fields: dict[str, Any], status: int, stream: bool, logged: io.StringIO
) -> None:
    app = app_over(served, max_body_bytes=5000)
    async with address_of(app) as address, httpx.AsyncClient(base_url=address) as client:
        reply = await client.post(CHAT, json=BODY | {"stream": stream} | fields)
    # The first event of a stream with best_of 1 is text, so an error after it cannot change the status.
    assert reply.status_code == status or (stream and reply.status_code == 200)
    assert CHAT in logged.getvalue()  # the access log is on


@pytest.mark.usefixtures("logged")
async def test_no_text_is_logged_for_score_requests_broken_json_and_text_in_headers() -> None:
    app = app_over(pipeline(generator(), QuotingScorer()), max_header_bytes=2000)
    async with address_of(app, max_header_bytes=2000) as address, httpx.AsyncClient(base_url=address) as client:
        await client.post("/v1/score", json={"prompt": PROMPT, "candidates": [COMPLETION]})
        await client.post("/v1/score", json={"prompt": PROMPT, "candidates": COMPLETION})
        await client.post(CHAT, content=f'{{"messages": "{PROMPT}')
        await client.post(CHAT, content=PROMPT, headers={"Content-Type": f"text/{PROMPT}"})
        await client.post(CHAT, json=BODY, headers={"X-Text": PROMPT * 1000})
        reader, writer = await asyncio.open_connection(*address.removeprefix("http://").split(":"))
        writer.write(f"{PROMPT}\r\n\r\n".encode())
        await reader.read()
        writer.close()


@pytest.mark.usefixtures("logged")
async def test_no_text_is_logged_for_refusals_by_access_control(tmp_path: Path) -> None:
    key = api_keys.new_key(tmp_path / "keys.toml", "alice", requests_per_minute=2)
    app = app_over(pipeline(generator()), keys_file=tmp_path / "keys.toml")
    async with address_of(app, key=key) as address, httpx.AsyncClient(base_url=address) as client:
        for presented in (key, key, key, COMPLETION):
            await client.post(CHAT, json=BODY, headers={"Authorization": f"Bearer {presented}"})


@pytest.mark.usefixtures("logged")
async def test_no_text_is_logged_for_clients_that_are_slow_or_disconnect() -> None:
    app = app_over(pipeline(generator(delays_s={0: 60})), client_timeout_s=0.1)
    async with address_of(app, client_timeout_s=0.1) as address:
        async with httpx.AsyncClient(base_url=address) as client:
            with pytest.raises(httpx.ReadTimeout):
                await client.post(CHAT, json=BODY, timeout=0.2)
        reader, writer = await asyncio.open_connection(*address.removeprefix("http://").split(":"))
        body = json.dumps(BODY).encode()
        writer.write(b"POST %s HTTP/1.1\r\nContent-Length: %d\r\n\r\n%s" % (CHAT.encode(), len(body) + 1, body))
        assert b" 408 " in await reader.read()
        writer.close()


@pytest.mark.usefixtures("logged")
@pytest.mark.parametrize("status", [200, 400, 429, 500])
async def test_no_text_is_logged_for_requests_to_an_upstream_server(status: int) -> None:
    """The official client logs the whole request at level debug."""

    def handle(_: httpx2.Request) -> httpx2.Response:
        if status == 200:
            return httpx2.Response(200, text=f"data: {COMPLETION}\n\n", headers={"content-type": "text/event-stream"})
        return httpx2.Response(status, json={"error": {"message": f"{PROMPT}? {COMPLETION}!"}})

    http = httpx2.AsyncClient(transport=httpx2.MockTransport(handle))
    client = openai.AsyncOpenAI(base_url="http://upstream/v1", api_key="key", http_client=http, max_retries=0)
    upstream = OpenAIGenerator("policy", client, upstream_model="theirs")
    prompt = Prompt(messages=(Message("user", PROMPT),))
    with contextlib.suppress(NbestError):
        async with upstream.generate(prompt, SamplingParams(), 1) as generation:
            assert [outcome async for outcomes in generation for outcome in outcomes]
    await upstream.close()
