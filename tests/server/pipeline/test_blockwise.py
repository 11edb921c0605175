"""Blockwise best-of-N: the chosen blocks, their continuations, the stream and the counts, worked out by hand."""

import json
from dataclasses import replace
from typing import Any

import pytest

from reranker.candidate import Candidate
from server.config import Settings
from server.errors import BadRequestError, ContextLengthError, DeadlineError, NbestError
from server.generation.base import SamplingParams
from server.generation.stop_strings import cut_at_spanning_stop, text_before_possible_stop
from server.offline.tasks import BatchTaskParser, RerankTaskParser
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
"""The second text has the best first block, the first text the best second block, and the second the best third."""
BLOCKWISE = {"strategy": "blockwise", "block_tokens": 2}


def scripted() -> tuple[ScriptedGenerator, BestOfN]:
    generator = ScriptedGenerator(TEXTS)
    return generator, pipeline(generator, ScriptedScorer(REWARDS))


def body(nbest: dict[str, Any] = BLOCKWISE, **fields: Any) -> dict[str, Any]:
    return HELLO | {"best_of": 2, "seed": 100, "nbest": nbest} | fields


def request(**fields: Any) -> BestOfNRequest:
    return ChatCompletionRequest.model_validate(body(**fields)).to_request(Settings())


async def answer(best_of_n: BestOfN, **fields: Any) -> tuple[BestOfNResult, list[str]]:
    """The result, and the texts of all chosen blocks but the last."""
    observer = RecordingObserver()
    result = await best_of_n.run(request(**fields), observer)
    assert not any(chosen.finish_reason for chosen in observer.blocks)
    assert observer.results == [result]
    return result, [chosen.text for chosen in observer.blocks]


async def test_each_block_continues_the_best_candidate_of_the_block_before() -> None:
    generator, best_of_n = scripted()
    result, blocks = await answer(best_of_n)
    assert result.selection.winner.candidate.text == "u v c d y z"
    assert result.selection.winner.candidate.finish_reason == "stop"
    assert result.selection.winner.reward == 4
    assert blocks == ["u v", "u v c d"]
    afters = [sampling.after for _, sampling, _ in generator.calls]
    assert [after.text if after else None for after in afters] == [None, "u v", "u v c d"]
    assert [sampling.seed for _, sampling, _ in generator.calls] == [100, 102, 104]


async def test_the_cost_is_that_of_all_blocks() -> None:
    result, _ = await answer(scripted()[1])
    assert result.blocks == 3
    assert (result.best_of, result.completed) == (2, 2)
    assert result.prompt_tokens == 7
    assert result.generated_tokens == 3 * 2 * 2
    assert result.scored_tokens == 2 * (2 + 4 + 6)


@pytest.mark.parametrize(("max_tokens", "text"), [(5, "u v c d y"), (4, "u v c d"), (1, "a")])
async def test_the_answer_ends_at_max_tokens(max_tokens: int, text: str) -> None:
    result, _ = await answer(scripted()[1], max_tokens=max_tokens)
    assert result.selection.winner.candidate.text == text
    assert result.selection.winner.candidate.finish_reason == "length"


@pytest.mark.parametrize(
    ("error", "stopped_by"), [(DeadlineError("late"), "deadline"), (ContextLengthError(""), "all")]
)
async def test_an_error_in_a_later_block_returns_the_blocks_before_it(error: NbestError, stopped_by: str) -> None:
    _, best_of_n = scripted()
    deadlines: list[float | None] = []

    async def run_block(block: BestOfNRequest, queued_s: float) -> BestOfNResult:
        deadlines.append(block.deadline_s)
        if len(deadlines) == 3:
            raise error
        return await best_of_n.run(replace(block, strategy="argmax"), queued_s=queued_s)

    result = await blockwise.run(run_block, replace(request(), deadline_s=50.0), RunObserver())
    assert (result.selection.winner.candidate.text, result.stopped_by) == ("u v c d", stopped_by)
    first, second, third = deadlines
    assert first == 50
    assert second is not None
    assert third is not None
    assert 50 > second > third > 0


async def test_an_error_in_the_first_block_fails_the_request() -> None:
    async def run_block(block: BestOfNRequest, queued_s: float) -> BestOfNResult:
        raise DeadlineError("late")

    with pytest.raises(DeadlineError):
        await blockwise.run(run_block, request(), RunObserver())


@pytest.mark.parametrize(
    ("num_tokens", "finish_reason", "ended"),
    [(6, "length", False), (6, "stop", True), (5, "length", True), (10, "length", True)],
    ids=["full block", "stopped", "context full", "max_tokens reached"],
)
def test_a_candidate_has_ended_unless_it_filled_its_block_below_max_tokens(
    num_tokens: int, finish_reason: Any, ended: bool
) -> None:
    begun = num_tokens - 4 if num_tokens != 5 else 2
    sampling = SamplingParams(max_tokens=10, block_tokens=4, after=Candidate(0, "", begun))
    assert blockwise.has_ended(Candidate(0, "", num_tokens, finish_reason=finish_reason), sampling) is ended


@pytest.mark.parametrize(
    ("text", "stop", "text_before_stop"),
    [
        ("one two##three", ("##",), None),
        ("one two #three", ("##", "o #t"), "one tw"),
        ("one two #three", (" ", "two #"), "one "),
        ("one two #three", ("#thr", "two "), None),
    ],
    ids=["after the boundary", "across it", "the earlier of two", "not across it"],
)
def test_a_stop_string_across_a_block_boundary_ends_the_answer(
    text: str, stop: tuple[str, ...], text_before_stop: str | None
) -> None:
    """A stop string after the boundary is found by the engine, so it is left alone here."""
    boundary = len("one two" if "##" in text else "one two ")
    candidate = cut_at_spanning_stop(Candidate(0, text, 3, finish_reason="length"), boundary, stop)
    assert candidate.text == (text if text_before_stop is None else text_before_stop)
    assert candidate.finish_reason == ("length" if text_before_stop is None else "stop")


@pytest.mark.parametrize(
    ("text", "certain"), [("one #", "one "), ("one ##", "one "), ("one", "one"), ("one # ", "one # ")]
)
def test_text_that_may_begin_a_stop_string_is_held_back(text: str, certain: str) -> None:
    assert text_before_possible_stop(text, ("###", "\n")) == certain


async def test_a_stream_has_each_block_once_and_counts_its_tokens_once() -> None:
    async with client_of(app_over(scripted()[1])) as client:
        reply = await client.post("/v1/chat/completions", json=body() | {"stream": True})
        metrics = (await client.get("/metrics")).text
    data = [line.removeprefix("data: ") for line in reply.text.splitlines() if line.startswith("data: ")]
    chunks = [json.loads(chunk) for chunk in data[:-1]]
    assert [chunk["choices"][0]["delta"].get("content") for chunk in chunks] == ["u v", " c d", " y z", None]
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    account = chunks[-1]["nbest"]
    assert (account["strategy"], account["blocks"]) == ("blockwise", 3)
    assert account["kl_upper_bound"] == pytest.approx(3 * (0.6931 - 0.5), abs=1e-3)
    assert "nbest_generated_tokens_total 12.0" in metrics
    assert 'nbest_candidates_total{outcome="completed"} 6.0' in metrics


async def test_without_streaming_the_answer_is_the_same() -> None:
    async with client_of(app_over(scripted()[1])) as client:
        reply = (await client.post("/v1/chat/completions", json=body())).json()
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
def test_fields_that_blockwise_does_not_support_are_refused(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(BadRequestError) as refused:
        request(**fields)
    assert refused.value.param == param


def test_blockwise_over_an_upstream_server_is_refused() -> None:
    settings = Settings(generator="openai", base_url="http://up/v1", model="m", reward_models={"r": "python:f.py:f"})
    with pytest.raises(BadRequestError, match="accepts text only"):
        ChatCompletionRequest.model_validate(body()).to_request(settings)


def test_offline_runs_refuse_blockwise() -> None:
    parser = BatchTaskParser(Settings(), model="scripted", seed=0)
    with pytest.raises(BadRequestError, match="whole candidates"):
        parser.parse(1, "1", {"prompt": "x", "nbest": BLOCKWISE})
    with pytest.raises(BadRequestError, match="candidates are complete"):
        RerankTaskParser(Settings()).parse(1, "1", {"prompt": "x", "candidates": ["a"], "nbest": BLOCKWISE})
