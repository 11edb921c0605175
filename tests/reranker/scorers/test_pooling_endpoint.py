"""The pooling endpoint with a scripted HTTP server, which has the bodies and replies of vLLM 0.32."""

import contextlib
import json
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, get_args

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from reranker.candidate import Candidate, Message, Prompt
from reranker.models.reward_model import RewardModel
from reranker.scorers.base import Scores, ScoringError, UnscorableError
from reranker.scorers.pooling_endpoint import PoolingEndpointScorer
from reranker.scorers.spec import EndpointSpec, Route, ScorerSpecError
from tests.support.json_shapes import mutations
from tests.support.tiny_models import CONTEXT_LENGTH, save_tiny_reward_model, tiny_tokenizer

CHAT = Prompt(messages=(Message("user", "What is the capital of France?"),))
TEXT = Prompt(text="The film was")
SERVER = "http://pooling:8001"
Body = dict[str, Any]


class ScriptedServer:
    """A pooling server whose score of an input is its length; `answer` replaces its replies."""

    def __init__(self, root: str, max_model_len: int | None = CONTEXT_LENGTH) -> None:
        self.models: Any = {"data": [{"id": "reward", "root": root, "max_model_len": max_model_len}]}
        self.requests: list[tuple[str, Body]] = []
        self.answer: Callable[[Body], httpx.Response] | None = None

    def handle(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/models":
            return httpx.Response(200, json=self.models)
        body = json.loads(request.content)
        self.requests.append((request.url.path, body))
        if self.answer:
            return self.answer(body)
        sizes = [float(len(text)) for text in body.get("input") or body["text_2"]]
        numbers = {
            "/classify": [
                {"index": i, "label": "LABEL_0", "probs": [s], "num_classes": 1} for i, s in enumerate(sizes)
            ],
            "/pooling": [{"index": i, "object": "pooling", "data": [s]} for i, s in enumerate(sizes)],
            "/score": [{"index": i, "object": "score", "score": s} for i, s in enumerate(sizes)],
        }[request.url.path]
        return httpx.Response(200, json={"data": numbers, "usage": {"prompt_tokens": 55, "total_tokens": 55}})


Connect = Callable[..., Awaitable[PoolingEndpointScorer]]


@pytest.fixture
async def connect() -> AsyncIterator[Connect]:
    connected: list[PoolingEndpointScorer] = []

    async def connect(
        server: ScriptedServer, route: Route = "classify", tokenizer: str | None = None
    ) -> PoolingEndpointScorer:
        client = httpx.AsyncClient(transport=httpx.MockTransport(server.handle))
        spec = EndpointSpec(SERVER, route, tokenizer)
        connected.append(await PoolingEndpointScorer.connect("remote", spec, client=client))
        return connected[-1]

    yield connect
    for scorer in connected:
        await scorer.close()


@pytest.fixture
def reward_model(tmp_path: Path) -> str:
    """A chat reward model whose tokenizer differs from that of every policy in the tests."""
    tokenizer = tiny_tokenizer(adds_bos=True, corpus=["capital of France", "delight of the cast"])
    return str(save_tiny_reward_model(tmp_path / "reward", tokenizer=tokenizer))


def candidates(*texts: str) -> list[Candidate]:
    return [Candidate(index, text, num_tokens=1) for index, text in enumerate(texts)]


@pytest.mark.parametrize("route", ["classify", "pooling"])
@pytest.mark.parametrize("prompt", [CHAT, TEXT])
async def test_one_http_request_has_the_token_ids_of_all_candidates(
    connect: Connect, reward_model: str, route: Route, prompt: Prompt
) -> None:
    server = ScriptedServer(reward_model)
    scores = await (await connect(server, route)).score(prompt, candidates("Paris.", "It is Rome, of course."))
    model = RewardModel.load(reward_model, device="cpu", dtype="float32")
    expected = [list(model.render(prompt, text).token_ids) for text in ("Paris.", "It is Rome, of course.")]
    assert server.requests == [(f"/{route}", {"model": "reward", "use_activation": False, "input": expected})]
    assert scores == Scores(tuple(float(len(ids)) for ids in expected), scored_tokens=55)
    bos = AutoTokenizer.from_pretrained(reward_model).bos_token_id
    assert [ids.count(bos) for ids in expected] == [1, 1]


async def test_the_score_route_sends_prompt_and_candidates_as_text(connect: Connect) -> None:
    server = ScriptedServer("/only/there")
    scores = await (await connect(server, "score")).score(CHAT, candidates("Paris.", "Rome"))
    pair = {"text_1": "What is the capital of France?", "text_2": ["Paris.", "Rome"]}
    assert server.requests == [("/score", {"model": "reward", "use_activation": False} | pair)]
    assert scores.rewards_N == (6.0, 4.0)


async def test_without_the_tokenizer_texts_are_sent_and_a_warning_is_logged(
    connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    server = ScriptedServer("/only/there")
    scorer = await connect(server)
    assert "The tokenizer of /only/there at http://pooling:8001 cannot be loaded here" in caplog.text
    turns = Prompt(messages=(Message("system", "Be brief."), *CHAT.messages))
    await scorer.score(turns, candidates("Paris."))
    await scorer.score(TEXT, candidates(" a delight"))
    assert [body["input"] for _, body in server.requests] == [
        ["system: Be brief.\n\nuser: What is the capital of France?\n\nassistant: Paris."],
        ["The film was a delight"],
    ]


async def test_the_tokenizer_in_the_url_is_used_and_a_missing_one_is_an_error(
    connect: Connect, reward_model: str
) -> None:
    server = ScriptedServer("/only/there")
    await (await connect(server, tokenizer=reward_model)).score(CHAT, candidates("Paris."))
    assert isinstance(server.requests[0][1]["input"][0][0], int)
    with pytest.raises(ScorerSpecError, match="cannot load the tokenizer /nowhere"):
        await connect(server, tokenizer="/nowhere")


async def test_a_candidate_too_long_for_the_server_is_not_sent_and_has_no_reward(
    connect: Connect, reward_model: str
) -> None:
    server = ScriptedServer(reward_model, max_model_len=40)
    scorer = await connect(server)
    missing, known = (await scorer.score(CHAT, candidates("x" * 60, "Paris."))).rewards_N
    assert math.isnan(missing)
    assert len(server.requests[0][1]["input"]) == 1
    assert len(server.requests[0][1]["input"][0]) <= 40 == known  # the prompt was cut from the left to fit
    with pytest.raises(ScoringError, match=r"the candidate alone is 6\d tokens"):
        await scorer.score(CHAT, candidates("x" * 60))


class TestReplies:
    async def scored(self, connect: Connect, server: ScriptedServer, route: Route = "classify") -> Scores:
        return await (await connect(server, route)).score(TEXT, candidates("a", "b"))

    def answering(self, status: int, content: Any) -> ScriptedServer:
        server = ScriptedServer("/only/there")
        server.answer = lambda body: httpx.Response(status, json=content)
        return server

    async def test_items_are_ordered_by_their_index(self, connect: Connect) -> None:
        items = [{"index": 1, "probs": [-2.5]}, {"index": 0, "probs": [4.0]}]
        assert await self.scored(connect, self.answering(200, {"data": items})) == Scores((4.0, -2.5), scored_tokens=0)

    async def test_of_a_number_per_token_the_last_is_taken(self, connect: Connect) -> None:
        items = [{"index": 0, "data": [[1.0], [2.0]]}, {"index": 1, "data": 3.0}]
        assert (await self.scored(connect, self.answering(200, {"data": items}), "pooling")).rewards_N == (2.0, 3.0)

    async def test_a_null_score_is_a_missing_reward(self, connect: Connect) -> None:
        items = [{"index": 0, "score": None}, {"index": 1, "score": 3.0}]
        missing, known = (await self.scored(connect, self.answering(200, {"data": items}), "score")).rewards_N
        assert math.isnan(missing)
        assert known == 3.0

    @pytest.mark.parametrize(
        ("status", "content", "message"),
        [
            (
                400,
                {"error": {"message": "context is 128"}},
                r"http://pooling:8001/classify replied: context is 128 \(status 400\)",
            ),
            (404, {"detail": "Not Found"}, r"replied: Not Found \(status 404\)"),
            (502, "bad gateway", r"replied: .*bad gateway.* \(status 502\)"),
            (200, {"data": [{"index": 0, "probs": [1.0]}]}, "http://pooling:8001/classify did not return 2 numbers"),
            (200, {"data": [{"index": 0, "probs": [0.4, 0.6]}]}, "the model returns 2 numbers per text"),
            (200, {"data": [{"index": 0, "probs": ["high"]}]}, "could not convert"),
            (200, ["unexpected"], "did not return 2 numbers"),
        ],
    )
    async def test_a_refusal_or_wrong_reply_is_an_error_with_the_reason(
        self, connect: Connect, status: int, content: Any, message: str
    ) -> None:
        server = self.answering(status, content)
        with pytest.raises(ScoringError, match=message):
            await self.scored(connect, server)
        assert len(server.requests) == 1  # nothing is retried

    @pytest.mark.parametrize(
        ("status", "kind"),
        [(400, UnscorableError), (413, UnscorableError), (422, UnscorableError), (503, ScoringError)],
    )
    async def test_texts_that_the_server_refuses_are_another_error_than_a_failure(
        self, connect: Connect, status: int, kind: type[ScoringError]
    ) -> None:
        with pytest.raises(ScoringError) as error:
            await self.scored(connect, self.answering(status, {"detail": "no"}))
        assert type(error.value) is kind

    @pytest.mark.parametrize("usage", [None, [], {}, {"prompt_tokens": None}, {"prompt_tokens": "9"}])
    async def test_without_a_count_of_tokens_none_are_counted(self, connect: Connect, usage: Any) -> None:
        items = [{"index": 1, "probs": [-2.5]}, {"index": 0, "probs": [4.0]}]
        server = self.answering(200, {"data": items, "usage": usage})
        assert await self.scored(connect, server) == Scores((4.0, -2.5), scored_tokens=0)

    @pytest.mark.parametrize("route", get_args(Route))
    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture])  # each example connects anew
    @given(data=st.data())
    async def test_any_reply_is_rewards_or_a_scoring_error(
        self, connect: Connect, route: Route, data: st.DataObject
    ) -> None:
        items = [{"index": index, "probs": [0.5], "data": [0.5], "score": 0.5} for index in range(2)]
        reply = data.draw(mutations({"data": items, "usage": {"prompt_tokens": 3}}))
        try:
            scores = await self.scored(connect, self.answering(200, reply), route)
        except ScoringError:
            return
        assert [type(reward) for reward in scores.rewards_N] == [float, float]
        assert scores.scored_tokens >= 0

    async def test_an_unreachable_server_is_an_error(self, connect: Connect) -> None:
        server = ScriptedServer("/only/there")

        def refused(body: Body) -> httpx.Response:
            raise httpx.ConnectError("connection refused")

        server.answer = refused
        with pytest.raises(ScoringError, match="http://pooling:8001/classify does not answer: connection refused"):
            await self.scored(connect, server)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(reply=mutations({"data": [{"id": "reward", "root": "/only/there", "max_model_len": 128}]}))
async def test_any_list_of_models_connects_or_is_an_error_at_the_start(connect: Connect, reply: Any) -> None:
    server = ScriptedServer("")
    server.models = reply
    with contextlib.suppress(ScorerSpecError):
        await connect(server, "score")  # it needs no tokenizer, which would be looked up under the drawn name


async def test_an_encoder_that_reads_segments_needs_the_score_route(connect: Connect, tmp_path: Path) -> None:
    server = ScriptedServer(str(save_tiny_reward_model(tmp_path, "bert")))
    with pytest.raises(ScorerSpecError, match=r"as a pair with segment ids.*use vllm:http://pooling:8001/score"):
        await connect(server)
    assert (await (await connect(server, "score")).score(CHAT, candidates("Paris."))).rewards_N == (6.0,)


async def test_an_encoder_without_segments_gets_token_ids_of_the_pair(connect: Connect, tmp_path: Path) -> None:
    directory = save_tiny_reward_model(tmp_path, "deberta-v2")
    server = ScriptedServer(str(directory))
    await (await connect(server)).score(CHAT, candidates("Paris."))
    pair = AutoTokenizer.from_pretrained(directory)("What is the capital of France?", "Paris.")
    assert server.requests[0][1]["input"] == [pair["input_ids"]]


@pytest.mark.parametrize(
    "reply", [httpx.Response(503), httpx.Response(200, text="hello"), httpx.Response(200, json={"data": []})]
)
async def test_a_server_without_a_model_is_an_error_at_the_start(reply: httpx.Response) -> None:
    client = httpx.AsyncClient(transport=httpx.MockTransport(lambda request: reply))
    with pytest.raises(ScorerSpecError, match=r"http://pooling:8001/v1/models does not name.*start that server first"):
        await PoolingEndpointScorer.connect("remote", EndpointSpec(SERVER, "classify", None), client=client)
    assert client.is_closed
