"""The upstream generator with a scripted HTTP server, through the real openai client."""

import json
from collections.abc import Callable
from typing import Any

import httpx2
import openai
import pytest

from reranker.candidate import Candidate, FailedCandidate, Message, Prompt
from server.errors import BadRequestError, GenerationError, NotReadyError, OverloadedError
from server.generation.base import Outcome, SamplingParams
from server.generation.openai_upstream import OpenAIGenerator

CHAT = Prompt(messages=(Message("user", "hello"),))
Answer = Callable[[dict[str, Any]], httpx2.Response]


def upstream(answer: Answer) -> tuple[OpenAIGenerator, list[dict[str, Any]]]:
    """A generator for a server that replies with `answer`, and the request bodies that the server receives."""
    bodies: list[dict[str, Any]] = []

    def handle(request: httpx2.Request) -> httpx2.Response:
        bodies.append(json.loads(request.content))
        return answer(bodies[-1])

    http = httpx2.AsyncClient(transport=httpx2.MockTransport(handle))
    client = openai.AsyncOpenAI(base_url="http://upstream/v1", api_key="key", http_client=http, max_retries=0)
    return OpenAIGenerator("policy", client, upstream_model="theirs"), bodies


def stream_of(*chunks: dict[str, Any], prompt_tokens: int = 5) -> httpx2.Response:
    usage = {"choices": [], "usage": {"prompt_tokens": prompt_tokens, "completion_tokens": 0, "total_tokens": 0}}
    events = [f"data: {json.dumps(chunk)}\n\n" for chunk in (*chunks, usage)]
    return httpx2.Response(
        200, text="".join(events) + "data: [DONE]\n\n", headers={"content-type": "text/event-stream"}
    )


def piece(index: int, text: str, finish: str | None = None, logprob: float | None = None) -> dict[str, Any]:
    entries: list[dict[str, Any]] = [{"token": text, "logprob": logprob, "bytes": None, "top_logprobs": []}]
    logprobs = None if logprob is None else {"content": entries}
    choice = {"index": index, "delta": {"content": text}, "finish_reason": finish, "logprobs": logprobs}
    return {"id": "x", "object": "chat.completion.chunk", "created": 0, "model": "theirs", "choices": [choice]}


def choices_up_to(at_most: int) -> Answer:
    """A server that returns at most `at_most` choices; the text of each is its seed and index."""

    def answer(body: dict[str, Any]) -> httpx2.Response:
        return stream_of(*(piece(i, f"{body.get('seed')}/{i}", "stop") for i in range(min(body["n"], at_most))))

    return answer


async def sample(
    generator: OpenAIGenerator, n: int, sampling: SamplingParams | None = None, **options: Any
) -> list[Outcome]:
    async with generator.generate(CHAT, sampling or SamplingParams(), n, **options) as generation:
        return [outcome async for outcomes in generation for outcome in outcomes]


async def test_one_request_with_n_is_sent_and_deltas_are_joined() -> None:
    interleaved = [piece(0, "a", logprob=-1.0), piece(1, "x", logprob=-3.0), piece(0, "b", "length", logprob=-0.5)]
    generator, bodies = upstream(lambda body: stream_of(*interleaved, piece(1, "y", "stop", logprob=-4.0)))
    first, second = await sample(generator, 2, SamplingParams(max_tokens=9, stop=("END",), logit_bias=((7, -1.0),)))
    assert isinstance(first, Candidate)
    assert (first.text, first.num_tokens, first.cumulative_logprob, first.finish_reason) == ("ab", 2, -1.5, "length")
    assert isinstance(second, Candidate)
    assert (second.index, second.text, second.cumulative_logprob) == (1, "xy", -7.0)
    assert len(bodies) == 1
    assert (bodies[0]["n"], bodies[0]["model"], bodies[0]["max_tokens"]) == (2, "theirs", 9)
    assert (bodies[0]["stop"], bodies[0]["logit_bias"]) == (["END"], {"7": -1.0})


async def test_missing_choices_are_sampled_by_further_requests_with_their_own_seeds() -> None:
    generator, bodies = upstream(choices_up_to(at_most=2))
    outcomes = await sample(generator, 5, SamplingParams(seed=100))
    assert [body["n"] for body in bodies] == [5, 2, 1]
    texts = {outcome.index: outcome.text for outcome in outcomes if isinstance(outcome, Candidate)}
    assert texts == {0: "100/0", 1: "100/1", 2: "102/0", 3: "102/1", 4: "104/0"}


async def test_a_server_that_returns_no_choices_fails_every_candidate() -> None:
    generator, bodies = upstream(choices_up_to(at_most=0))
    outcomes = await sample(generator, 2)
    assert [outcome.index for outcome in outcomes if isinstance(outcome, FailedCandidate)] == [0, 1]
    assert len(bodies) == 1


async def test_partial_candidates_are_yielded_while_they_grow() -> None:
    generator, _ = upstream(lambda body: stream_of(piece(0, "a"), piece(0, "b", "stop")))
    snapshots = [
        (outcome.text, outcome.finish_reason)
        for outcome in await sample(generator, 1, stream_partial=True)
        if isinstance(outcome, Candidate)
    ]
    assert snapshots == [("a", None), ("ab", "stop")]


async def test_a_cancelled_candidate_is_not_yielded() -> None:
    generator, _ = upstream(choices_up_to(at_most=3))
    async with generator.generate(CHAT, SamplingParams(), 3) as generation:
        await generation.cancel(1)
        indexes = [outcome.index async for outcomes in generation for outcome in outcomes]
    assert sorted(indexes) == [0, 2]
    assert generation.prompt_tokens == 5


@pytest.mark.parametrize(
    ("status", "expected"),
    [(400, BadRequestError), (401, NotReadyError), (429, OverloadedError), (500, GenerationError)],
)
async def test_an_upstream_error_keeps_its_message(status: int, expected: type[Exception]) -> None:
    error = httpx2.Response(status, json={"error": {"message": "no such luck"}}, headers={"retry-after": "3"})
    generator, _ = upstream(lambda body: error)
    with pytest.raises(expected, match="no such luck") as caught:
        await sample(generator, 1)
    if isinstance(caught.value, OverloadedError):
        assert caught.value.retry_after_s == 3.0


async def test_a_failing_further_request_fails_only_its_candidates() -> None:
    answers = iter([stream_of(piece(0, "fine", "stop")), httpx2.Response(500, json={"error": {"message": "broke"}})])
    generator, _ = upstream(lambda body: next(answers))
    outcomes = await sample(generator, 2)
    assert [type(outcome) for outcome in outcomes] == [Candidate, FailedCandidate]


async def test_an_upstream_that_does_not_send_json_fails_its_candidates() -> None:
    def answer(_: dict[str, Any]) -> httpx2.Response:
        return httpx2.Response(200, text="data: hello\n\n", headers={"content-type": "text/event-stream"})

    outcomes = await sample(upstream(answer)[0], 2)
    reason = "The upstream server sent an event that is not JSON. Try again."
    assert outcomes == [FailedCandidate(0, reason), FailedCandidate(1, reason)]


async def test_a_stream_with_unexpected_json_raises_an_error() -> None:
    def answer(_: dict[str, Any]) -> httpx2.Response:
        return httpx2.Response(200, text='data: {"choices": 3}\n\n', headers={"content-type": "text/event-stream"})

    with pytest.raises((TypeError, AttributeError)):
        await sample(upstream(answer)[0], 1)
