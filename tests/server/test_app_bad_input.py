"""Invalid requests get an error with one sentence in OpenAI's envelope, and the next valid request is answered."""

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from server.errors import ContextLengthError, DeadlineError, NbestError, OverloadedError
from server.pipeline.best_of_n import BestOfN
from tests.support.doubles import ScriptedGenerator, ScriptedScorer
from tests.support.serving import HELLO, address_of, app_over, client_of, client_over, pipeline

CHAT = "/v1/chat/completions"
LIMIT = 1000


@pytest.fixture
async def client() -> AsyncIterator[httpx.AsyncClient]:
    """A client in memory; after the test it checks that a valid request is still answered."""
    app = app_over(pipeline(ScriptedGenerator(["word"])), max_body_bytes=LIMIT, max_best_of=8)
    async with client_of(app) as client:
        yield client
        assert (await client.post(CHAT, json=HELLO)).status_code == 200


def error_of(reply: httpx.Response, status: int) -> dict[str, Any]:
    """The error in the reply, which must have this status and OpenAI's envelope."""
    assert reply.status_code == status, reply.text
    assert list(reply.json()) == ["error"]
    error: dict[str, Any] = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"].endswith(".")
    return error


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b'{"model": "scripted",}', b"\xff\xfe", b'"text"', b"[]", b"null", b"[" * 500, b'{"a": "\\ud800"}'],
)
async def test_malformed_json_is_400(client: httpx.AsyncClient, body: bytes) -> None:
    reply = await client.post(CHAT, content=body, headers={"Content-Type": "application/json"})
    assert "JSON" in error_of(reply, 400)["message"]


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize("field", ["temperature", "seed", "logit_bias", "metadata", "nbest", "response_format"])
async def test_numbers_that_are_not_finite_are_400(client: httpx.AsyncClient, number: str, field: str) -> None:
    values = {
        "logit_bias": '{"1": NUMBER}',
        "metadata": '{"a": NUMBER}',
        "nbest": '{"deadline_s": NUMBER}',
        "response_format": '{"type": "json_schema", "json_schema": {"name": "n", "schema": {"maximum": NUMBER}}}',
    }
    value = values.get(field, "NUMBER").replace("NUMBER", number)
    body = f'{json.dumps(HELLO)[:-1]}, "{field}": {value}}}'
    error_of(await client.post(CHAT, content=body, headers={"Content-Type": "application/json"}), 400)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"model": None}, "model"),
        ({"messages": []}, "messages"),
        ({"messages": "Hello?"}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content[0].type",
        ),
        ({"temperature": "hot"}, "temperature"),
        ({"best_of": 0}, "best_of"),
        ({"best_of": 9}, "best_of"),
        ({"best_of": 2, "n": 3}, "n"),
        ({"best-of": 2}, "best-of"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"logit_bias": {"cat": 1}}, "logit_bias.cat"),
        ({"nbest": {"reward_model": "unheard-of"}}, "nbest.reward_model"),
        ({"nbest": {"strategy": "tournament"}}, "nbest.strategy"),
        ({"nbest": {"strategy": "majority", "selection": {"answer_regex": "(["}}}, "nbest.selection.answer_regex"),
        ({"nbest": {"stopping": {"policy": "sometimes"}}}, "nbest.stopping.policy"),
        ({"nbest": {"stopping": {"policy": "adaptive", "price": 0}}}, "nbest.stopping.price"),
        ({"nbest": {"stopping": {"policy": "adaptive", "checkpoints": [8]}}}, "nbest.stopping.checkpoints"),
        ({"nbest": {"deadline": 3}}, "nbest.deadline"),
    ],
)
async def test_the_error_names_the_invalid_field(client: httpx.AsyncClient, fields: dict[str, Any], param: str) -> None:
    error = error_of(await client.post(CHAT, json=HELLO | fields), 400)
    assert (error["param"], error["type"]) == (param, "invalid_request_error")


async def test_an_unserved_model_is_404_and_the_error_names_the_served_one(client: httpx.AsyncClient) -> None:
    error = error_of(await client.post(CHAT, json=HELLO | {"model": "gpt-4"}), 404)
    assert error["param"] == "model"
    assert "ask for scripted." in error["message"]


async def test_the_error_for_an_unserved_reward_model_names_the_served_ones(client: httpx.AsyncClient) -> None:
    body = {"prompt": "x", "candidates": ["y"], "reward_model": "unheard-of"}
    error = error_of(await client.post("/v1/score", json=body), 400)
    assert error["param"] == "reward_model"
    assert "scripted-reward" in error["message"]


@pytest.mark.parametrize(
    ("method", "path", "status"), [("GET", "/v2", 404), ("GET", CHAT, 405), ("POST", "/health", 405)]
)
async def test_unknown_paths_and_methods_are_named_in_the_error(
    client: httpx.AsyncClient, method: str, path: str, status: int
) -> None:
    assert path in error_of(await client.request(method, path), status)["message"]


async def test_another_content_type_is_400(client: httpx.AsyncClient) -> None:
    for content_type in ("text/plain", "application/x-www-form-urlencoded; charset=utf-8"):
        reply = await client.post(CHAT, content=b"model=scripted", headers={"Content-Type": content_type})
        assert "application/json" in error_of(reply, 400)["message"]


@pytest.mark.parametrize("content_type", ["application/json; charset=utf-8", "Application/JSON", None])
async def test_json_is_accepted_with_any_spelling_of_its_content_type(
    client: httpx.AsyncClient, content_type: str | None
) -> None:
    headers = {"Content-Type": content_type} if content_type else {}
    body = b'{"model": "scripted", "messages": [{"role": "user", "content": "x"}]}'
    assert (await client.post(CHAT, content=body, headers=headers)).status_code == 200


async def test_a_body_at_the_limit_is_accepted_and_a_larger_body_is_413(client: httpx.AsyncClient) -> None:
    def body(size: int) -> bytes:
        frame = b'{"model": "scripted", "messages": [{"role": "user", "content": "%s"}]}'
        return frame % (b"x" * (size - len(frame) + 2))

    assert (await client.post(CHAT, content=body(LIMIT))).status_code == 200
    assert str(LIMIT) in error_of(await client.post(CHAT, content=body(LIMIT + 1)), 413)["message"]


async def test_a_chunked_body_is_refused_as_soon_as_it_exceeds_the_limit(client: httpx.AsyncClient) -> None:
    sent = 0

    async def chunks() -> AsyncIterator[bytes]:
        nonlocal sent
        for _ in range(100):
            sent += 100
            yield b"x" * 100

    error_of(await client.post(CHAT, content=chunks()), 413)
    assert sent <= LIMIT + 100


async def test_ten_megabytes_over_a_socket_are_413_and_the_server_stays_usable() -> None:
    app = app_over(pipeline(ScriptedGenerator(["word"])))
    async with address_of(app) as address, httpx.AsyncClient(base_url=address) as client:
        error_of(await client.post(CHAT, content=b"x" * 10_000_000), 413)
        assert (await client.post(CHAT, json=HELLO)).status_code == 200


@pytest.mark.parametrize(
    ("refusal", "status", "code", "retry_after"),
    [
        (ContextLengthError("The prompt is too long.", param="messages"), 400, "context_length_exceeded", None),
        (OverloadedError("Too much is in flight.", retry_after_s=2.2), 429, "overloaded", "3"),
        (DeadlineError("Too slow."), 504, "deadline_exceeded", None),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_an_error_of_the_engine_has_its_status_and_code(
    refusal: NbestError, status: int, code: str, retry_after: str | None, stream: bool
) -> None:
    async with client_over(ScriptedGenerator(["word"], refusal=refusal)) as client:
        reply = await client.post(CHAT, json=HELLO | {"stream": stream})
    assert error_of(reply, status)["code"] == code
    assert reply.headers.get("Retry-After") == retry_after


async def test_a_failed_reward_model_is_503_with_a_retry_after() -> None:
    async with client_over(ScriptedGenerator(["word"]), ScriptedScorer(fails=True)) as client:
        reply = await client.post(CHAT, json=HELLO)
    assert error_of(reply, 503)["code"] == "reward_failed"
    assert reply.headers["Retry-After"] == "5"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_bug_is_a_500_that_leaks_nothing(stream: bool) -> None:
    class BrokenPipeline(BestOfN):
        async def run(self, *args: Any, **kwargs: Any) -> Any:
            raise RuntimeError("the password is hunter2")

    async with client_of(app_over(BrokenPipeline(ScriptedGenerator(["word"]), {"r": ScriptedScorer()}))) as client:
        reply = await client.post(CHAT, json=HELLO | {"stream": stream})
    assert error_of(reply, 500)["type"] == "server_error"
    assert "hunter2" not in reply.text
