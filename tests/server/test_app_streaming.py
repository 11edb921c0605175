"""Streams over a real socket: the official client, errors before and after the first event, and disconnects."""

import asyncio
import json
from typing import Any

import httpx
import openai
import pytest

from server.errors import BadRequestError
from server.pipeline.best_of_n import BestOfN
from tests.support.doubles import ScriptedGenerator, ScriptedScorer
from tests.support.serving import HELLO, address_of, app_over, client_over, pipeline

CHAT = "/v1/chat/completions"


@pytest.mark.parametrize("best_of", [1, 3])
async def test_the_official_client_reads_a_chat_stream(best_of: int) -> None:
    app = app_over(pipeline(ScriptedGenerator(["so very good"], word_delay_s=0.001)))
    async with (
        address_of(app) as address,
        openai.AsyncOpenAI(api_key="unused", base_url=f"{address}/v1", max_retries=0) as client,
    ):
        chunks = [
            chunk
            async for chunk in await client.chat.completions.create(
                model="scripted",
                messages=[{"role": "user", "content": "How was it?"}],
                stream=True,
                stream_options={"include_usage": True},
                extra_body={"best_of": best_of},
            )
        ]
    *with_choice, last = chunks
    assert "".join(chunk.choices[0].delta.content or "" for chunk in with_choice) == "so very good"
    assert with_choice[0].choices[0].delta.role == "assistant"
    assert with_choice[-1].choices[0].finish_reason == "stop"
    assert with_choice[-1].model_extra is not None
    assert with_choice[-1].model_extra["nbest"]["completed"] == best_of
    assert last.usage is not None
    assert last.usage.completion_tokens == 3 * best_of


async def test_the_official_client_reads_a_completion_stream() -> None:
    app = app_over(pipeline(ScriptedGenerator(["so very good"])))
    async with (
        address_of(app) as address,
        openai.AsyncOpenAI(api_key="unused", base_url=f"{address}/v1", max_retries=0) as client,
    ):
        stream = await client.completions.create(model="scripted", prompt="It was", best_of=2, stream=True)
        assert "".join([chunk.choices[0].text async for chunk in stream]) == "so very good"


async def test_the_official_client_reads_the_events_of_stream_candidates() -> None:
    app = app_over(pipeline(ScriptedGenerator(["good", None, "best"]), ScriptedScorer({"good": 1.0, "best": 2.0})))
    request: Any = {
        "model": "scripted",
        "messages": [{"role": "user", "content": "How was it?"}],
        "extra_body": {"best_of": 3, "nbest": {"stream_candidates": True}},
    }
    async with (
        address_of(app) as address,
        openai.AsyncOpenAI(api_key="unused", base_url=f"{address}/v1", max_retries=0) as client,
    ):
        chunks = [chunk async for chunk in await client.chat.completions.create(stream=True, **request)]
        async with client.chat.completions.stream(**request) as stream:  # the client joins the chunks
            completion = await stream.get_final_completion()
    events = [chunk.model_extra["nbest"] for chunk in chunks if chunk.model_extra and not chunk.choices]
    assert sorted((event["event"], event["index"]) for event in events) == [
        ("failed", 1),
        ("finished", 0),
        ("finished", 2),
        ("scored", 0),
        ("scored", 2),
    ]
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == completion.choices[0].message.content == "best"


async def test_stream_candidates_without_stream_is_400() -> None:
    async with client_over(ScriptedGenerator(["word"])) as client:
        reply = await client.post(CHAT, json=HELLO | {"nbest": {"stream_candidates": True}})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "nbest.stream_candidates")


async def test_the_first_token_arrives_while_the_rest_is_generated() -> None:
    app = app_over(pipeline(ScriptedGenerator(["first " + "word " * 200], word_delay_s=60)))
    body = HELLO | {"best_of": 1, "stream": True}
    async with (
        address_of(app) as address,
        httpx.AsyncClient(base_url=address) as client,
        client.stream("POST", CHAT, json=body) as reply,
    ):
        assert reply.headers["content-type"].startswith("text/event-stream")
        assert reply.headers["cache-control"] == "no-cache"
        first = await anext(reply.aiter_lines())
        assert json.loads(first.removeprefix("data: "))["choices"][0]["delta"]["content"] == "first"


def last_event(reply: httpx.Response) -> Any:
    assert reply.status_code == 200
    return json.loads(reply.text.rstrip().rpartition("\n")[2].removeprefix("data: "))


async def test_an_error_after_the_first_event_is_the_last_event() -> None:
    async with client_over(ScriptedGenerator(["word"]), ScriptedScorer(fails=True)) as client:
        reply = await client.post(CHAT, json=HELLO | {"best_of": 2, "stream": True})
    assert last_event(reply)["error"]["code"] == "reward_failed"
    assert "[DONE]" not in reply.text


async def test_the_official_client_raises_an_error_that_is_an_event() -> None:
    app = app_over(pipeline(ScriptedGenerator(["word"]), ScriptedScorer(fails=True)))
    async with (
        address_of(app) as address,
        openai.AsyncOpenAI(api_key="unused", base_url=f"{address}/v1", max_retries=0) as client,
    ):
        stream = await client.completions.create(model="scripted", prompt="It was", best_of=2, stream=True)
        with pytest.raises(openai.APIError, match="The reward model failed"):
            await anext(aiter(stream))


async def test_a_bug_after_the_first_event_leaks_nothing() -> None:
    class BrokenScorer(ScriptedScorer):
        async def score(self, *args: Any) -> Any:
            raise RuntimeError("the password is hunter2")

    async with client_over(ScriptedGenerator(["word"]), BrokenScorer()) as client:
        reply = await client.post(CHAT, json=HELLO | {"best_of": 2, "stream": True})
    assert last_event(reply)["error"]["type"] == "server_error"
    assert "hunter2" not in reply.text


async def test_an_error_before_the_first_event_has_its_status() -> None:
    generator = ScriptedGenerator(["word"], refusal=BadRequestError("No.", param="messages"))
    async with client_over(generator) as client:
        reply = await client.post(CHAT, json=HELLO | {"stream": True})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "messages")


class TestDisconnect:
    """The client disconnects from requests that would take a minute."""

    async def disconnect(self, path: str, body: dict[str, Any], served: BestOfN) -> None:
        """Sends a request, disconnects, and returns when the server has ended the request."""
        async with address_of(app_over(served)) as address, httpx.AsyncClient(base_url=address) as client:
            with pytest.raises(httpx.ReadTimeout):
                await client.post(path, json=body, timeout=0.2)
            for _ in range(100):
                if f'endpoint="{path}"' in (await client.get("/metrics")).text:
                    return
                await asyncio.sleep(0.01)
            pytest.fail("the server did not notice that the client had disconnected")

    @pytest.mark.parametrize("stream", [False, True])
    async def test_it_cancels_the_unfinished_candidates(self, stream: bool) -> None:
        generator = ScriptedGenerator(["a", "b", "c"], delays_s={1: 60, 2: 60})
        body = HELLO | {"best_of": 3, "stream": stream}
        await self.disconnect(CHAT, body, pipeline(generator))
        assert sorted(generator.cancelled) == [1, 2]

    async def test_it_cancels_candidates_before_the_first_event_of_a_stream(self) -> None:
        generator = ScriptedGenerator(["a"], delays_s={0: 60})
        await self.disconnect(CHAT, HELLO | {"best_of": 1, "stream": True}, pipeline(generator))
        assert generator.cancelled == [0]

    async def test_it_cancels_scoring(self) -> None:
        cancelled = []

        class SlowScorer(ScriptedScorer):
            async def score(self, *args: Any) -> Any:
                try:
                    return await super().score(*args)
                except BaseException as error:
                    cancelled.append(type(error).__name__)
                    raise

        body = {"prompt": "x", "candidates": ["a"]}
        await self.disconnect("/v1/score", body, pipeline(ScriptedGenerator(["a"]), SlowScorer(delay_s=60)))
        assert cancelled == ["CancelledError"]
