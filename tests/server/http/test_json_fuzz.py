"""Fuzzed JSON bodies: never a 5xx, and every refusal is a sentence in OpenAI's error envelope."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.doubles import ObjectGenerator
from tests.support.serving import app_over, client_of, pipeline

BASES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {
        "model": "scripted",
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello?"}],
        "best_of": 2,
        "n": 1,
        "stop": ["\n"],
        "logit_bias": {"1": 0.5},
        "logprobs": True,
        "top_logprobs": 2,
        "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}}},
        "nbest": {"strategy": "weighted_majority", "selection": {"answer_regex": "(\\w+)"}, "return_candidates": True},
    },
    "/v1/completions": {"model": "scripted", "prompt": "Hello", "best_of": 2, "logprobs": 1, "seed": 3, "stream": True},
    "/v1/score": {"prompt": "Hello", "candidates": ["a", "b"], "reward_model": "scripted-reward"},
}
BOUNDARIES = [0, -1, 1, 2**31, 2**63, 2**64, -(2**63), 10**400, 1e308, -0.0, 1e-300, "", "\x00", "\ud800", "💥", [], {}]

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=True)
    | st.text(st.characters(), max_size=8)
    | st.sampled_from(BOUNDARIES)
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


def locations(node: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) in a document."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, child in items:
        yield node, key
        yield from locations(child)


@st.composite
def mutated(draw: st.DrawFn) -> tuple[str, bytes]:
    """A valid request in which a few values are replaced, removed, renamed or nested."""
    path = draw(st.sampled_from(sorted(BASES)))
    document = json.loads(json.dumps(BASES[path]))
    for _ in range(draw(st.integers(1, 3))):
        targets = list(locations(document))
        if not targets:
            break
        container, key = draw(st.sampled_from(targets))
        match draw(st.sampled_from(["replace", "remove", "nest", "rename"])):
            case "replace":
                container[key] = draw(values)
            case "remove":
                del container[key]
            case "nest":
                container[key] = [container[key]]
            case "rename" if isinstance(container, dict):
                container[draw(st.text(max_size=6))] = container.pop(key)
    return path, json.dumps(document).encode()


@st.composite
def spliced(draw: st.DrawFn) -> tuple[str, bytes]:
    """The bytes of a valid request with some removed and others inserted."""
    path = draw(st.sampled_from(sorted(BASES)))
    body = json.dumps(BASES[path]).encode()
    start = draw(st.integers(0, len(body)))
    end = draw(st.integers(start, min(len(body), start + 8)))
    inserted = draw(
        st.binary(max_size=4) | st.sampled_from([b"[" * 300, b'{"a":' * 300, b"1" * 5000, b"\\ud800", b"NaN"])
    )
    return path, body[:start] + inserted + body[end:]


anything = st.tuples(st.sampled_from(sorted(BASES)), values.map(lambda value: json.dumps(value).encode()))


@pytest.fixture(scope="module")
def post() -> Iterator[Any]:
    """Sends a body; all tests of the module share one server."""
    app = app_over(pipeline(ObjectGenerator(["so very good", "42"])), max_best_of=4, max_body_bytes=100_000)
    with asyncio.Runner() as runner:
        client_context = client_of(app)
        client = runner.run(client_context.__aenter__())

        def send(path: str, body: bytes) -> httpx.Response:
            return runner.run(client.post(path, content=body, headers={"Content-Type": "application/json"}))

        yield send
        runner.run(client_context.__aexit__(None, None, None))


@given(request=mutated() | spliced() | anything)
@settings(max_examples=600, deadline=None, derandomize=True)
def test_any_body_is_answered_or_refused_in_the_envelope(post: Any, request: tuple[str, bytes]) -> None:
    reply = post(*request)
    if reply.status_code == 504:  # the right reply to a deadline of a nanosecond
        assert reply.json()["error"]["code"] == "deadline_exceeded"
        return
    assert reply.status_code < 500, reply.text
    if reply.status_code != 200:
        assert list(reply.json()) == ["error"]
        assert set(reply.json()["error"]) == {"message", "type", "param", "code"}
        assert reply.json()["error"]["message"].endswith(".")


def test_every_base_request_is_valid(post: Any) -> None:
    for path, body in BASES.items():
        assert post(path, json.dumps(body).encode()).status_code == 200
