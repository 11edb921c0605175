"""Whole replies: OpenAI's objects, the rewards and the account, with expected numbers computed by hand."""

import math
from typing import Any

import httpx
import openai
import pytest

from reranker.scorers.base import UnscorableCandidatesError, UnscorableError
from server.observability.metrics import Metrics
from tests.support.doubles import ScriptedGenerator, ScriptedScorer
from tests.support.serving import HELLO, address_of, app_over, client_of, client_over, pipeline

FILMS = ["dull", "a fine film", "great fun"]
"""1, 3 and 2 words; a word is a token."""
TASTE = {"dull": -2.0, "a fine film": 1.0, "great fun": 2.5}


async def post(path: str, body: dict[str, Any], *scorers: ScriptedScorer, texts: Any = FILMS) -> Any:
    async with client_over(ScriptedGenerator(texts), *(scorers or [ScriptedScorer(TASTE)])) as client:
        reply = await client.post(path, json=body)
        assert reply.status_code == 200, reply.text
        return reply.json()


async def chat(*scorers: ScriptedScorer, texts: Any = FILMS, **fields: Any) -> Any:
    return await post("/v1/chat/completions", HELLO | {"best_of": 3} | fields, *scorers, texts=texts)


async def test_the_best_candidate_is_returned_in_the_format_of_openai() -> None:
    reply = await chat()
    assert reply["id"].startswith("chatcmpl-")
    assert (reply["object"], reply["model"], reply["system_fingerprint"]) == ("chat.completion", "scripted", None)
    assert reply["choices"] == [
        {
            "index": 0,
            "finish_reason": "stop",
            "reward": 2.5,
            "message": {"role": "assistant", "content": "great fun", "refusal": None},
            "logprobs": None,
        }
    ]


async def test_usage_counts_the_prompt_once_and_all_candidates() -> None:
    reply = await chat()
    assert reply["usage"] == {"prompt_tokens": 7, "completion_tokens": 1 + 3 + 2, "total_tokens": 13}


async def test_n_choices_are_returned_best_first() -> None:
    reply = await chat(n=2)
    assert [(choice["index"], choice["message"]["content"]) for choice in reply["choices"]] == [
        (0, "great fun"),
        (1, "a fine film"),
    ]


async def test_the_account_has_the_counts_ranking_timings_and_kl_bound() -> None:
    account = (await chat())["nbest"]
    timings = account.pop("timings_s")
    assert account.pop("kl_upper_bound") == pytest.approx(math.log(3) - 2 / 3)
    assert 0 < account.pop("candidate_s") <= 3 * timings["generate"]
    assert account == {
        "best_of": 3,
        "completed": 3,
        "failed": 0,
        "cancelled": 0,
        "not_drawn": 0,
        "strategy": "argmax",
        "reward_model": "scripted-reward",
        "ranking": [2, 1, 0],
        "ranked_by": "reward",
        "stopped_by": "all",
        "generated_tokens": 6,
        "scored_tokens": 6,
        "prompt_tokens_cut": 0,
        "blocks": 1,
    }
    assert set(timings) == {"queue", "generate", "score", "select", "total"}
    assert 0 < timings["generate"] < timings["total"]


async def test_return_candidates_returns_all_candidates_in_the_order_of_sampling() -> None:
    candidates = (await chat(nbest={"return_candidates": True}))["nbest"]["candidates"]
    assert [(candidate["index"], candidate["text"], candidate["reward"]) for candidate in candidates] == [
        (0, "dull", -2.0),
        (1, "a fine film", 1.0),
        (2, "great fun", 2.5),
    ]
    assert candidates[1] | {"text": "", "reward": 0} == {
        "index": 1,
        "text": "",
        "reward": 0,
        "cumulative_logprob": -3.0,
        "finish_reason": "stop",
        "num_tokens": 3,
    }


async def test_a_failed_candidate_is_counted_and_is_not_part_of_the_kl_bound() -> None:
    account = (await chat(texts=["dull", None, "great fun"]))["nbest"]
    assert (account["completed"], account["failed"]) == (2, 1)
    assert account["kl_upper_bound"] == pytest.approx(math.log(2) - 1 / 2)


async def test_a_missing_reward_is_null() -> None:
    reply = await chat(ScriptedScorer(TASTE | {"dull": math.nan}), n=3)
    assert [choice["reward"] for choice in reply["choices"]] == [2.5, 1.0, None]


async def test_ranked_by_names_the_fallback_after_a_reward_failure() -> None:
    reply = await chat(ScriptedScorer(fails=True), nbest={"on_reward_failure": "first"})
    assert (reply["choices"][0]["message"]["content"], reply["choices"][0]["reward"]) == ("dull", None)
    assert reply["nbest"]["ranked_by"] == "first"


async def test_majority_counts_votes_without_using_the_reward_model() -> None:
    texts = ['{"stars": 3}', '{"stars": 5}', '{"stars": 5.0}']
    options = {"strategy": "majority", "selection": {"answer_json_pointer": "/stars"}, "return_candidates": True}
    reply = await chat(ScriptedScorer(fails=True), texts=texts, nbest=options, n=2)
    assert [(choice["message"]["content"], choice["reward"]) for choice in reply["choices"]] == [
        (texts[1], None),
        (texts[2], None),
    ]
    account = reply["nbest"]
    assert (account["strategy"], account["ranked_by"], account["reward_model"]) == ("majority", "answer", None)
    assert [candidate["reward"] for candidate in account["candidates"]] == [None, None, None]
    assert account["scored_tokens"] == 0


async def test_candidates_cancelled_by_a_deadline_are_part_of_the_kl_bound() -> None:
    generator = ScriptedGenerator(FILMS, delays_s={2: 60})
    async with client_over(generator, ScriptedScorer(TASTE)) as client:
        body = HELLO | {"best_of": 3, "nbest": {"deadline_s": 0.05}}
        account = (await client.post("/v1/chat/completions", json=body)).json()["nbest"]
    assert (account["stopped_by"], account["completed"], account["cancelled"]) == ("deadline", 2, 1)
    assert account["kl_upper_bound"] == pytest.approx(math.log(3) - 2 / 3)
    assert generator.cancelled == [2]


async def test_the_account_counts_the_candidates_that_a_stopping_policy_did_not_draw() -> None:
    stopping = {"policy": "adaptive", "target_reward": 1.0, "wave": 2}
    account = (await chat(ScriptedScorer(TASTE), best_of=5, nbest={"stopping": stopping}))["nbest"]
    assert (account["stopped_by"], account["completed"], account["not_drawn"]) == ("adaptive", 2, 3)
    assert account["kl_upper_bound"] == pytest.approx(math.log(5) - 4 / 5)


async def test_a_deadline_before_any_candidate_finished_is_504() -> None:
    generator = ScriptedGenerator(FILMS, delays_s=dict.fromkeys(range(4), 60))
    async with client_over(generator) as client:
        reply = await client.post("/v1/chat/completions", json=HELLO | {"nbest": {"deadline_s": 0.05}})
    assert (reply.status_code, reply.json()["error"]["code"]) == (504, "deadline_exceeded")


async def test_a_reward_failure_without_a_fallback_is_503_without_an_answer() -> None:
    async with client_over(ScriptedGenerator(FILMS), ScriptedScorer(fails=True)) as client:
        reply = await client.post("/v1/chat/completions", json=HELLO)
    assert (reply.status_code, reply.json()["error"]["code"]) == (503, "reward_failed")
    assert list(reply.json()) == ["error"]
    assert reply.headers["Retry-After"] == "5"


async def test_the_request_chooses_its_reward_model() -> None:
    other = ScriptedScorer({"dull": 9.0})
    other.name = "contrary"
    reply = await chat(ScriptedScorer(TASTE), other, nbest={"reward_model": "contrary"})
    assert (reply["choices"][0]["message"]["content"], reply["nbest"]["reward_model"]) == ("a fine film", "contrary")


async def test_max_tokens_cuts_the_text_and_finish_reason_is_length() -> None:
    choice = (await chat(texts=["one two three"], best_of=1, max_completion_tokens=2))["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("one two", "length")


async def test_chat_logprobs_have_the_format_of_openai() -> None:
    reply = await chat(texts=["so good"], best_of=1, logprobs=True, top_logprobs=2)
    first, second = reply["choices"][0]["logprobs"]["content"]
    assert first["top_logprobs"][1] == {"token": "other-1", "logprob": -2.0, "bytes": list(b"other-1")}
    assert {name: value for name, value in second.items() if name != "top_logprobs"} == {
        "token": " good",
        "logprob": -1.0,
        "bytes": [32, 103, 111, 111, 100],
    }


class TestCompletions:
    async def test_the_best_continuation_is_returned_in_the_format_of_openai(self) -> None:
        reply = await post("/v1/completions", {"model": "scripted", "prompt": "It was", "best_of": 3})
        assert reply["id"].startswith("cmpl-")
        assert reply["object"] == "text_completion"
        assert reply["choices"] == [
            {"index": 0, "finish_reason": "stop", "reward": 2.5, "text": "great fun", "logprobs": None}
        ]

    async def test_logprobs_are_lists_of_equal_length_and_top_logprobs_include_the_generated_token(self) -> None:
        body = {"model": "scripted", "prompt": "It was", "best_of": 1, "logprobs": 0}
        choice = (await post("/v1/completions", body, texts=["so very good"]))["choices"][0]
        assert choice["logprobs"] == {
            "tokens": ["so", " very", " good"],
            "token_logprobs": [-1.0, -1.0, -1.0],
            "top_logprobs": [{"so": -1.0}, {" very": -1.0}, {" good": -1.0}],
            "text_offset": [0, 2, 7],
        }


class TestScore:
    async def test_scores_are_in_the_order_of_the_candidates(self) -> None:
        body = {"prompt": "How was it?", "candidates": ["great fun", "dull"]}
        assert await post("/v1/score", body) == {
            "model": "scripted-reward",
            "data": [{"index": 0, "score": 2.5}, {"index": 1, "score": -2.0}],
            "usage": {"prompt_tokens": 3, "total_tokens": 3, "prompt_tokens_cut": 0},
        }

    async def test_a_candidate_that_cannot_be_scored_is_null(self) -> None:
        body = {"messages": HELLO["messages"], "candidates": ["dull"]}
        assert (await post("/v1/score", body, ScriptedScorer({"dull": math.nan})))["data"][0]["score"] is None

    @pytest.mark.parametrize(
        ("refusal", "given", "param"),
        [
            (UnscorableError("no system role"), {"messages": HELLO["messages"]}, "messages"),
            (UnscorableError("no tokens"), {"prompt": "x"}, "prompt"),
            (UnscorableCandidatesError("too long"), {"prompt": "x"}, "candidates"),
        ],
    )
    async def test_what_the_reward_model_cannot_read_is_400_and_names_the_field(
        self, refusal: UnscorableError, given: dict[str, Any], param: str
    ) -> None:
        async with client_over(ScriptedGenerator(FILMS), ScriptedScorer(refusal=refusal)) as client:
            reply = await client.post("/v1/score", json=given | {"candidates": ["dull"]})
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)
        assert f"The reward model cannot score this: {refusal}. Change {param}, or" in reply.json()["error"]["message"]

    async def test_a_reward_model_that_fails_is_503(self) -> None:
        async with client_over(ScriptedGenerator(FILMS), ScriptedScorer(fails=True)) as client:
            reply = await client.post("/v1/score", json={"prompt": "x", "candidates": ["dull"]})
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "reward_failed")


async def test_the_official_client_parses_every_reply() -> None:
    app = app_over(pipeline(ScriptedGenerator(FILMS), ScriptedScorer(TASTE)))
    async with (
        address_of(app) as address,
        openai.AsyncOpenAI(api_key="unused", base_url=f"{address}/v1", max_retries=0) as client,
    ):
        answer = await client.chat.completions.create(
            model="scripted",
            messages=[{"role": "user", "content": "How was it?"}],
            logprobs=True,
            extra_body={"best_of": 3},
        )
        assert answer.choices[0].message.content == "great fun"
        assert answer.choices[0].logprobs is not None
        assert answer.model_extra is not None
        assert answer.model_extra["nbest"]["completed"] == 3

        text = await client.completions.create(model="scripted", prompt="It was", best_of=3, logprobs=1)
        assert text.choices[0].text == "great fun"

        assert [model.id async for model in client.models.list()] == ["scripted"]

        with pytest.raises(openai.BadRequestError) as refusal:
            await client.completions.create(model="scripted", prompt="It was", best_of=3, suffix="and so on")
        assert refusal.value.param == "suffix"


async def test_models_lists_the_policy_and_its_reward_models() -> None:
    async with client_over(ScriptedGenerator(FILMS)) as client:
        [model] = (await client.get("/v1/models")).json()["data"]
    assert (model["id"], model["object"], model["reward_models"]) == ("scripted", "model", ["scripted-reward"])


async def test_metrics_count_requests_candidates_tokens_and_rewards() -> None:
    metrics = Metrics()
    app = app_over(pipeline(ScriptedGenerator(["dull", None, "great fun"]), ScriptedScorer(TASTE)), metrics)
    async with client_of(app) as client:
        await client.post("/v1/chat/completions", json=HELLO | {"best_of": 3})
        await client.post("/v1/chat/completions", json=HELLO | {"best_of": 0})
        await client.post("/v1/score", json={"prompt": "x", "candidates": ["great fun"]})
        await client.get("/no/such/path")
        exposition = (await client.get("/metrics")).text.splitlines()
    for line in [
        'nbest_requests_total{endpoint="/v1/chat/completions",status="200"} 1.0',
        'nbest_requests_total{endpoint="/v1/chat/completions",status="400"} 1.0',
        'nbest_requests_total{endpoint="/v1/score",status="200"} 1.0',
        'nbest_requests_total{endpoint="unknown",status="404"} 1.0',
        'nbest_candidates_total{outcome="completed"} 2.0',
        'nbest_candidates_total{outcome="failed"} 1.0',
        "nbest_candidates_in_flight 0.0",
        "nbest_generated_tokens_total 3.0",
        "nbest_scored_tokens_total 5.0",  # 1 + 2 in the chat, 2 in the score request
        "nbest_prompt_tokens_total 7.0",
        "nbest_ready 1.0",
        'nbest_answers_total{ranked_by="reward",stopped_by="all"} 1.0',
        'nbest_winner_reward_count{reward_model="scripted-reward"} 1.0',
        'nbest_reward_gain_sum{reward_model="scripted-reward"} 2.25',  # 2.5 over the mean of 2.5 and -2
    ]:
        assert line in exposition


async def test_reward_failures_are_counted_by_how_the_request_ended() -> None:
    metrics = Metrics()
    app = app_over(pipeline(ScriptedGenerator(FILMS), ScriptedScorer(fails=True)), metrics)
    async with client_of(app) as client:
        for policy in ("error", "first", "first", "logprob"):
            await client.post("/v1/chat/completions", json=HELLO | {"nbest": {"on_reward_failure": policy}})
        await client.post("/v1/score", json={"prompt": "x", "candidates": ["dull"]})
        await client.post("/v1/chat/completions", json=HELLO | {"nbest": {"strategy": "majority"}})
    counted = {
        ended_as: metrics.registry.get_sample_value("nbest_reward_failures_total", {"ended_as": ended_as})
        for ended_as in ("error", "first", "logprob")
    }
    assert counted == {"error": 2, "first": 2, "logprob": 1}


async def test_a_scrape_of_the_metrics_reports_whether_the_engine_is_ready() -> None:
    generator = ScriptedGenerator(FILMS)
    async with client_over(generator) as client:
        generator.ready = False
        assert "nbest_ready 0.0" in (await client.get("/metrics")).text.splitlines()


async def test_the_engine_streams_partial_candidates_only_for_a_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    requested: list[bool] = []
    generator = ScriptedGenerator(FILMS)
    generate = generator.generate

    def recording_generate(*args: Any, stream_partial: bool) -> Any:
        requested.append(stream_partial)
        return generate(*args, stream_partial=stream_partial)

    monkeypatch.setattr(generator, "generate", recording_generate)
    async with client_over(generator) as client:
        for stream in (False, True):
            await client.post("/v1/chat/completions", json=HELLO | {"best_of": 1, "stream": stream})
    assert requested == [False, True]


async def test_when_the_engine_is_down_health_is_200_and_ready_is_503() -> None:
    generator = ScriptedGenerator(FILMS)
    async with client_over(generator) as client:
        assert (await client.get("/health")).json() == {"status": "ok"}
        assert (await client.get("/ready")).json() == {"status": "ready"}
        generator.ready = False
        assert (await client.get("/health")).status_code == 200
        reply: httpx.Response = await client.get("/ready")
        assert (reply.status_code, reply.json()["error"]["message"]) == (503, "the scripted engine is down")
