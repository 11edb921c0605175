"""The judge on another server, a scripted one behind real httpx."""

import json
import math
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reranker.candidate import Candidate, Message, Prompt
from reranker.scorers.base import Scores, ScoringError, UnscorableError
from reranker.scorers.judge import GRADE_SCHEMA, Judge, JudgeScorer
from reranker.scorers.judge_endpoint import JudgeEndpoint
from tests.support.json_shapes import mutations

QUESTION = Prompt(messages=(Message("user", "Capital of France?"),))
ANSWER: dict[str, Any] = {
    "choices": [{"index": 0, "message": {"role": "assistant", "content": '{"grade": 7}'}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 90, "completion_tokens": 5, "total_tokens": 95},
}
Respond = Callable[[dict[str, Any]], httpx.Response]


class ScriptedServer:
    """Answers each request with what `respond` makes of its body."""

    def __init__(self, respond: Respond) -> None:
        self.requests: list[httpx.Request] = []
        self._respond = respond

    @property
    def bodies(self) -> list[dict[str, Any]]:
        return [json.loads(request.content) for request in self.requests]

    def handle(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        return self._respond(json.loads(request.content))

    async def score(self, *texts: str, scorer: JudgeScorer | None = None) -> Scores:
        candidates = [Candidate(index, text, num_tokens=1) for index, text in enumerate(texts)]
        return await (scorer or self.scorer()).score(QUESTION, candidates)

    def scorer(self) -> JudgeScorer:
        client = httpx.AsyncClient(transport=httpx.MockTransport(self.handle))
        return JudgeScorer("judge", Judge(JudgeEndpoint("http://judge/v1/chat/completions", "large", client)))


def answering(reply: Any, status: int = 200) -> ScriptedServer:
    return ScriptedServer(lambda _: httpx.Response(status, json=reply))


def refusing(*names: str) -> ScriptedServer:
    """A server that refuses requests with any of these fields, in OpenAI's words."""

    def respond(body: dict[str, Any]) -> httpx.Response:
        refused = next((name for name in names if name in body), None)
        if refused is None:
            return httpx.Response(200, json=ANSWER)
        return httpx.Response(400, json={"error": {"message": f"Unsupported parameter: '{refused}'", "param": refused}})

    return ScriptedServer(respond)


async def test_one_request_has_the_question_the_schema_and_nothing_else_and_its_usage_counts() -> None:
    server = answering(ANSWER)
    assert await server.score("Paris") == Scores((7.0,), scored_tokens=95)
    (body,) = server.bodies
    assert set(body) == {"model", "messages", "max_tokens", "temperature", "response_format"}
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("large", 0.0, 64)
    assert body["response_format"]["json_schema"]["schema"] == GRADE_SCHEMA


async def test_the_key_is_sent_as_a_bearer_token() -> None:
    endpoint = JudgeEndpoint.connect("http://judge/v1/", "sk-judge", model="large")
    assert endpoint._client.headers["authorization"] == "Bearer sk-judge"
    assert endpoint._url == "http://judge/v1/chat/completions"
    await endpoint.close()


@pytest.mark.parametrize("refused", [("response_format",), ("max_tokens",), ("temperature",)], ids=str)
async def test_an_option_that_the_server_refuses_is_left_out_from_then_on_and_logged_once(
    refused: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    server = refusing(*refused)
    scorer = server.scorer()
    for _ in range(2):
        assert (await server.score("Rome", "Paris", scorer=scorer)).rewards_N == (7.0, 7.0)
    first, *_, last = server.bodies
    assert set(first) - set(last) == set(refused)
    assert len(caplog.records) == 1
    later = len(server.requests)
    await server.score("Rome", scorer=scorer)
    assert len(server.requests) == later + 1


async def test_a_server_that_refuses_everything_optional_gets_the_question_alone() -> None:
    server = refusing("response_format", "max_tokens", "max_completion_tokens", "temperature")
    assert (await server.score("Paris")).rewards_N == (7.0,)
    assert set(server.bodies[-1]) == {"model", "messages"}


async def test_openais_newer_name_of_max_tokens_is_tried_before_the_limit_is_left_out() -> None:
    server = refusing("max_tokens")
    await server.score("Paris")
    assert server.bodies[-1]["max_completion_tokens"] == 64


@pytest.mark.parametrize(
    "reply",
    [
        {"choices": None},
        {"choices": []},
        {"choices": [None]},
        {"choices": [{"message": None}]},
        {"choices": [{"message": {"content": None, "refusal": "No."}}]},
        {"choices": [{"message": {"content": [{"type": "text"}]}}]},
        {"error": None},
        [],
        "text",
    ],
    ids=str,
)
async def test_a_reply_without_a_text_is_an_error(reply: Any) -> None:
    with pytest.raises(ScoringError, match="judge: http://judge/v1/chat/completions sent no text"):
        await answering(reply).score("Paris")


@pytest.mark.parametrize(
    ("usage", "tokens"),
    [(None, 0), ([], 0), ({"prompt_tokens": 90}, 90), ({"prompt_tokens": None, "completion_tokens": 5}, 5)],
)
async def test_a_partial_usage_counts_what_is_there(usage: Any, tokens: int) -> None:
    assert (await answering(ANSWER | {"usage": usage}).score("Paris")).scored_tokens == tokens


@pytest.mark.parametrize(
    ("status", "body", "kind", "message"),
    [
        (400, {"error": {"message": "context is 128"}}, UnscorableError, r"context is 128 \(status 400\)"),
        (422, {"detail": "too long"}, UnscorableError, r"too long \(status 422\)"),
        (404, {"error": {"message": "no such model"}}, ScoringError, "no such model"),
        (429, {}, ScoringError, "status 429"),
        (500, "out of memory", ScoringError, "out of memory"),
    ],
)
async def test_a_refusal_is_another_error_than_a_failure(
    status: int, body: Any, kind: type[ScoringError], message: str
) -> None:
    with pytest.raises(ScoringError, match=message) as error:
        await answering(body, status).score("Paris")
    assert type(error.value) is kind


async def test_text_that_is_not_json_is_an_error() -> None:
    server = ScriptedServer(lambda _: httpx.Response(200, text='data: {"choices": []}\n\n'))
    with pytest.raises(ScoringError, match="did not send JSON"):
        await server.score("Paris")


async def test_an_unreachable_server_is_an_error() -> None:
    def respond(_: dict[str, Any]) -> httpx.Response:
        raise httpx.ReadTimeout("")

    with pytest.raises(ScoringError, match="does not answer: ReadTimeout"):
        await ScriptedServer(respond).score("Paris")


@given(reply=mutations(ANSWER), status=st.sampled_from([200, 400, 500]))
async def test_any_reply_is_a_grade_a_missing_reward_or_a_scoring_error(reply: Any, status: int) -> None:
    try:
        scores = await answering(reply, status).score("Paris")
    except ScoringError:
        return
    (reward,) = scores.rewards_N
    assert math.isnan(reward) or reward in range(1, 11)
    assert scores.scored_tokens >= 0
