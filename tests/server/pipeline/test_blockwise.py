"""Best-of-N block by block: what is chosen, gone on from, told and counted, by hand."""

import json
from dataclasses import replace
from typing import Any

import pytest

from reranker.candidate import Candidate
from server.config import Settings
from server.errors import BadRequestError, ContextLengthError, DeadlineError, NbestError
from server.generation.base import SamplingParams
from server.generation.candidate_builder import certain_text, stopped_across
from server.offline.tasks import BatchTasks, RerankTasks
from server.pipeline import blockwise
from server.pipeline.best_of_n import BestOfN
from server.pipeline.types import BestOfNRequest, BestOfNResult, RunObserver
from server.schemas.requests import ChatCompletionRequest
from tests.support.doubles import ScriptedGenerator, ScriptedScorer
from tests.support.observers import RecordingObserver
from tests.support.serving import HELLO, app_over, client_of, pipeline

TEXTS = ("a b c d e f", "u v w x y z")
REWARDS = {
    "a b": 1,
    "u v": 5,
    "u v c d": 9,
    "u v w x": 2,
    "u v c d e f": 3,
    "u v c d y z": 4,
    "u v c d e": 3,
    "u v c d y": 4,
}
"""The second text begins best, the first one goes on best, and the second ends best."""
BLOCKWISE = {"strategy": "blockwise", "block_tokens": 2}


def scripted() -> tuple[ScriptedGenerator, BestOfN]:
    generator = ScriptedGenerator(TEXTS)
    return generator, pipeline(generator, ScriptedScorer(REWARDS))


def asked(nbest: dict[str, Any] = BLOCKWISE, **fields: Any) -> dict[str, Any]:
    return HELLO | {"best_of": 2, "seed": 100, "nbest": nbest} | fields


async def answered(served: BestOfN, **fields: Any) -> tuple[BestOfNResult, list[str]]:
    """The result, and the texts of the chosen blocks but the last."""
    observer = RecordingObserver()
    request = ChatCompletionRequest.model_validate(asked(**fields)).to_request(Settings())
    result = await served.run(request, observer)
    assert not any(chosen.finish_reason for chosen in observer.blocks)
    assert observer.results == [result]
    return result, [chosen.text for chosen in observer.blocks]


async def test_the_best_of_each_block_is_gone_on_from() -> None:
    generator, served = scripted()
    result, told = await answered(served)
    assert result.selection.winner.candidate.text == "u v c d y z"
    assert result.selection.winner.candidate.finish_reason == "stop"
    assert result.selection.winner.reward == 4
    assert told == ["u v", "u v c d"]
    afters = [sampling.after for _, sampling, _ in generator.calls]
    assert [one.text if one else None for one in afters] == [None, "u v", "u v c d"]
    assert [sampling.seed for _, sampling, _ in generator.calls] == [100, 102, 104]


async def test_the_cost_is_that_of_all_blocks() -> None:
    result, _ = await answered(scripted()[1])
    assert result.blocks == 3
    assert (result.best_of, result.completed) == (2, 2)
    assert result.prompt_tokens == 7
    assert result.generated_tokens == 3 * 2 * 2
    assert result.scored_tokens == 2 * (2 + 4 + 6)


@pytest.mark.parametrize(("max_tokens", "text"), [(5, "u v c d y"), (4, "u v c d"), (1, "a")])
async def test_the_answer_ends_where_max_tokens_does(max_tokens: int, text: str) -> None:
    result, _ = await answered(scripted()[1], max_tokens=max_tokens)
    assert result.selection.winner.candidate.text == text
    assert result.selection.winner.candidate.finish_reason == "length"


@pytest.mark.parametrize(
    ("error", "stopped_by"), [(DeadlineError("late"), "deadline"), (ContextLengthError(""), "all")]
)
async def test_what_ends_a_later_block_leaves_the_answer_so_far(error: NbestError, stopped_by: str) -> None:
    _, served = scripted()
    plan = ChatCompletionRequest.model_validate(asked()).to_request(Settings())
    plan = replace(plan, deadline_s=50.0)
    deadlines: list[float | None] = []

    async def run_block(request: BestOfNRequest, queued_s: float) -> BestOfNResult:
        deadlines.append(request.deadline_s)
        if len(deadlines) == 3:
            raise error
        return await served.run(replace(request, strategy="argmax"), queued_s=queued_s)

    result = await blockwise.run(run_block, plan, RunObserver())
    assert (result.selection.winner.candidate.text, result.stopped_by) == ("u v c d", stopped_by)
    first, second, third = deadlines
    assert first == 50
    assert second is not None
    assert third is not None
    assert 50 > second > third > 0


async def test_a_first_block_that_fails_fails_the_request() -> None:
    async def run_block(request: BestOfNRequest, queued_s: float) -> BestOfNResult:
        raise DeadlineError("late")

    plan = ChatCompletionRequest.model_validate(asked()).to_request(Settings())
    with pytest.raises(DeadlineError):
        await blockwise.run(run_block, plan, RunObserver())


@pytest.mark.parametrize(
    ("num_tokens", "finish_reason", "ended"),
    [(6, "length", False), (6, "stop", True), (5, "length", True), (10, "length", True)],
    ids=["a whole block", "ended by itself", "the context is full", "max_tokens are"],
)
def test_nothing_follows_where(num_tokens: int, finish_reason: Any, ended: bool) -> None:
    begun = num_tokens - 4 if num_tokens != 5 else 2
    sampling = SamplingParams(max_tokens=10, block_tokens=4, after=Candidate(0, "", begun))
    assert blockwise.has_ended(Candidate(0, "", num_tokens, finish_reason=finish_reason), sampling) is ended


@pytest.mark.parametrize(
    ("text", "stop", "left"),
    [
        ("one two##three", ("##",), None),
        ("one two #three", ("##", "o #t"), "one tw"),
        ("one two #three", (" ", "two #"), "one "),
        ("one two #three", ("#thr", "two "), None),
    ],
    ids=["after the seam, the engine's", "across it", "the earlier one", "beside it"],
)
def test_a_stop_string_across_the_seam_ends_the_answer(text: str, stop: tuple[str, ...], left: str | None) -> None:
    seam = len("one two" if "##" in text else "one two ")
    found = stopped_across(Candidate(0, text, 3, finish_reason="length"), seam, stop)
    assert found.text == (text if left is None else left)
    assert found.finish_reason == ("length" if left is None else "stop")


@pytest.mark.parametrize(
    ("text", "told"), [("one #", "one "), ("one ##", "one "), ("one", "one"), ("one # ", "one # ")]
)
def test_what_may_begin_a_stop_string_is_not_told_yet(text: str, told: str) -> None:
    assert certain_text(text, ("###", "\n")) == told


async def test_a_stream_brings_each_block_once_and_counts_its_tokens_once() -> None:
    async with client_of(app_over(scripted()[1])) as client:
        reply = await client.post("/v1/chat/completions", json=asked() | {"stream": True})
        metrics = (await client.get("/metrics")).text
    data = [line.removeprefix("data: ") for line in reply.text.splitlines() if line.startswith("data: ")]
    chunks = [json.loads(one) for one in data[:-1]]
    assert [chunk["choices"][0]["delta"].get("content") for chunk in chunks] == ["u v", " c d", " y z", None]
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    account = chunks[-1]["nbest"]
    assert (account["strategy"], account["blocks"]) == ("blockwise", 3)
    assert account["kl_upper_bound"] == pytest.approx(3 * (0.6931 - 0.5), abs=1e-3)
    assert "nbest_generated_tokens_total 12.0" in metrics
    assert 'nbest_candidates_total{outcome="completed"} 6.0' in metrics


async def test_whole_it_is_the_same_answer() -> None:
    async with client_of(app_over(scripted()[1])) as client:
        reply = (await client.post("/v1/chat/completions", json=asked())).json()
    assert reply["choices"][0]["message"]["content"] == "u v c d y z"
    assert reply["usage"]["completion_tokens"] == 12


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"nbest": {"block_tokens": 4}}, "nbest.block_tokens"),
        ({"nbest": BLOCKWISE | {"stopping": {"policy": "adaptive"}}}, "nbest.stopping"),
        ({"nbest": BLOCKWISE | {"stream_candidates": True}, "stream": True}, "nbest.stream_candidates"),
        ({"nbest": BLOCKWISE | {"selection": {"temperature": 1}}}, "nbest.selection.temperature"),
        ({"n": 2}, "n"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"presence_penalty": 1}, "presence_penalty"),
        ({"frequency_penalty": -1}, "frequency_penalty"),
    ],
)
def test_what_does_not_go_with_blocks_is_refused(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(BadRequestError) as refused:
        ChatCompletionRequest.model_validate(asked(**fields)).to_request(Settings())
    assert refused.value.param == param


def test_an_upstream_server_cannot_go_on_from_tokens() -> None:
    settings = Settings(generator="openai", base_url="http://up/v1", model="m", reward_models={"r": "python:f.py:f"})
    with pytest.raises(BadRequestError, match="texts alone"):
        ChatCompletionRequest.model_validate(asked()).to_request(settings)


def test_offline_runs_refuse_it() -> None:
    drawing = BatchTasks(Settings(), model="scripted", seed=0)
    with pytest.raises(BadRequestError, match="whole candidates"):
        drawing.task(1, "1", {"prompt": "x", "nbest": BLOCKWISE})
    with pytest.raises(BadRequestError, match="whole already"):
        RerankTasks(Settings()).task(1, "1", {"prompt": "x", "candidates": ["a"], "nbest": BLOCKWISE})
