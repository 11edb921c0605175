"""The upstream generator against a scripted HTTP server, through the real openai client."""

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
    """A generator over a server that answers by `answer`, and the bodies that server receives."""
    asked: list[dict[str, Any]] = []

    def handle(request: httpx2.Request) -> httpx2.Response:
        asked.append(json.loads(request.content))
        return answer(asked[-1])

    http = httpx2.AsyncClient(transport=httpx2.MockTransport(handle))
    client = openai.AsyncOpenAI(base_url="http://upstream/v1", api_key="key", http_client=http, max_retries=0)
    return OpenAIGenerator("policy", client, upstream_model="theirs"), asked


def streamed(*chunks: dict[str, Any], prompt_tokens: int = 5) -> httpx2.Response:
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


def give(at_most: int) -> Answer:
    """A server that never gives more than so many choices; each says its own seed and index."""

    def answer(body: dict[str, Any]) -> httpx2.Response:
        return streamed(*(piece(i, f"{body.get('seed')}/{i}", "stop") for i in range(min(body["n"], at_most))))

    return answer


async def drawn(
    generator: OpenAIGenerator, n: int, sampling: SamplingParams | None = None, **options: Any
) -> list[Outcome]:
    async with generator.generate(CHAT, sampling or SamplingParams(), n, **options) as generation:
        return [outcome async for outcomes in generation for outcome in outcomes]


async def test_one_request_with_n_is_sent_and_deltas_are_added_up() -> None:
    interleaved = [piece(0, "a", logprob=-1.0), piece(1, "x", logprob=-3.0), piece(0, "b", "length", logprob=-0.5)]
    generator, asked = upstream(lambda body: streamed(*interleaved, piece(1, "y", "stop", logprob=-4.0)))
    first, second = await drawn(generator, 2, SamplingParams(max_tokens=9, stop=("END",), logit_bias=((7, -1.0),)))
    assert isinstance(first, Candidate)
    assert (first.text, first.num_tokens, first.cumulative_logprob, first.finish_reason) == ("ab", 2, -1.5, "length")
    assert isinstance(second, Candidate)
    assert (second.index, second.text, second.cumulative_logprob) == (1, "xy", -7.0)
    assert len(asked) == 1
    assert (asked[0]["n"], asked[0]["model"], asked[0]["max_tokens"]) == (2, "theirs", 9)
    assert (asked[0]["stop"], asked[0]["logit_bias"]) == (["END"], {"7": -1.0})


async def test_short_choice_lists_are_topped_up_with_seeds_of_their_own() -> None:
    generator, asked = upstream(give(at_most=2))
    outcomes = await drawn(generator, 5, SamplingParams(seed=100))
    assert [body["n"] for body in asked] == [5, 2, 1]
    texts = {one.index: one.text for one in outcomes if isinstance(one, Candidate)}
    assert texts == {0: "100/0", 1: "100/1", 2: "102/0", 3: "102/1", 4: "104/0"}


async def test_a_server_that_gives_nothing_fails_every_candidate() -> None:
    generator, asked = upstream(give(at_most=0))
    outcomes = await drawn(generator, 2)
    assert [one.index for one in outcomes if isinstance(one, FailedCandidate)] == [0, 1]
    assert len(asked) == 1


async def test_snapshots_grow() -> None:
    generator, _ = upstream(lambda body: streamed(piece(0, "a"), piece(0, "b", "stop")))
    seen = [
        (one.text, one.finish_reason)
        for one in await drawn(generator, 1, stream_partial=True)
        if isinstance(one, Candidate)
    ]
    assert seen == [("a", None), ("ab", "stop")]


async def test_a_dropped_candidate_is_not_yielded() -> None:
    generator, _ = upstream(give(at_most=3))
    async with generator.generate(CHAT, SamplingParams(), 3) as generation:
        await generation.cancel(1)
        outcomes = [outcome.index async for outcomes in generation for outcome in outcomes]
    assert sorted(outcomes) == [0, 2]
    assert generation.prompt_tokens == 5


@pytest.mark.parametrize(
    ("status", "expected"),
    [(400, BadRequestError), (401, NotReadyError), (429, OverloadedError), (500, GenerationError)],
)
async def test_upstream_errors_are_translated_with_their_own_words(status: int, expected: type[Exception]) -> None:
    error = httpx2.Response(status, json={"error": {"message": "no such luck"}}, headers={"retry-after": "3"})
    generator, _ = upstream(lambda body: error)
    with pytest.raises(expected, match="no such luck") as caught:
        await drawn(generator, 1)
    if isinstance(caught.value, OverloadedError):
        assert caught.value.retry_after_s == 3.0


async def test_a_failing_top_up_fails_only_its_candidates() -> None:
    answers = iter([streamed(piece(0, "fine", "stop")), httpx2.Response(500, json={"error": {"message": "broke"}})])
    generator, _ = upstream(lambda body: next(answers))
    outcomes = await drawn(generator, 2)
    assert [type(one) for one in outcomes] == [Candidate, FailedCandidate]


async def test_an_upstream_that_sends_no_json_fails_its_candidates() -> None:
    def answer(_: dict[str, Any]) -> httpx2.Response:
        return httpx2.Response(200, text="data: hello\n\n", headers={"content-type": "text/event-stream"})

    outcomes = await drawn(upstream(answer)[0], 2)
    reason = "The upstream server sent an event that is not JSON. Try again."
    assert outcomes == [FailedCandidate(0, reason), FailedCandidate(1, reason)]


async def test_a_stream_of_another_shape_ends_in_an_error_and_not_in_silence() -> None:
    def answer(_: dict[str, Any]) -> httpx2.Response:
        return httpx2.Response(200, text='data: {"choices": 3}\n\n', headers={"content-type": "text/event-stream"})

    with pytest.raises((TypeError, AttributeError)):
        await drawn(upstream(answer)[0], 1)
