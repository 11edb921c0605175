"""The events of a stream, one by one."""

import asyncio
import json
from functools import partial
from typing import Any

import pytest

from reranker.candidate import Candidate, FinishReason, TokenLogprob
from server.config import Settings
from server.http.response_builder import ChatReply, Reply, TextReply
from server.http.sse import ChoiceWriter, Run, stream
from server.pipeline.types import BestOfNRequest
from server.schemas.requests import ChatCompletionRequest, CompletionRequest
from tests.support.doubles import ScriptedGenerator, ScriptedScorer
from tests.support.serving import HELLO, pipeline


def snapshot(text: str, finish_reason: FinishReason | None = None, tokens: tuple[str, ...] = ()) -> Candidate:
    logprobs = tuple(TokenLogprob(token, -1.0) for token in tokens) or None
    return Candidate(0, text, len(tokens), finish_reason=finish_reason, logprobs=logprobs)


def chat_reply(**fields: Any) -> Reply:
    return ChatReply(ChatCompletionRequest.model_validate(HELLO | fields))


def text_reply(**fields: Any) -> Reply:
    return TextReply(CompletionRequest.model_validate({"model": "scripted", "prompt": "x"} | fields))


def run_of(
    generator: ScriptedGenerator, scorer: ScriptedScorer, best_of: int, **fields: Any
) -> tuple[Run, BestOfNRequest]:
    request = ChatCompletionRequest.model_validate(HELLO | {"best_of": best_of} | fields).to_request(Settings())

    return partial(pipeline(generator, scorer).run, request), request


async def collect(run: tuple[Run, BestOfNRequest], reply: Reply, keep_alive_s: float = 5) -> list[Any]:
    """The events: comments and [DONE] as text, chunks as dicts."""
    events: list[Any] = []
    async for event in stream(run[0], reply, run[1], keep_alive_s=keep_alive_s):
        assert event.endswith("\n\n")
        data = event.strip().removeprefix("data: ")
        events.append(json.loads(data) if data.startswith("{") else data)
    return events


class TestChoiceWriter:
    def test_each_chunk_brings_what_the_last_did_not(self) -> None:
        writer = ChoiceWriter(chat_reply(), 0)
        chunks = [
            *writer.grow(snapshot("Once")),
            *writer.grow(snapshot("Once upon")),
            *writer.grow(snapshot("Once upon")),
            *writer.finish(snapshot("Once upon a", "stop")),
        ]
        deltas = [chunk.model_dump(exclude_unset=True)["choices"][0]["delta"] for chunk in chunks]
        assert deltas == [{"role": "assistant", "content": "Once"}, {"content": " upon"}, {"content": " a"}]

    def test_half_a_character_waits_for_its_other_half(self) -> None:
        writer = ChoiceWriter(text_reply(), 0)
        texts = ["caf\ufffd", "café", "café \ufffd\ufffd", "café 🎬"]
        chunks = [chunk for text in texts for chunk in writer.grow(snapshot(text))]
        assert [chunk.model_dump()["choices"][0]["text"] for chunk in chunks] == ["caf", "é", " ", "🎬"]

    def test_a_half_that_never_comes_is_sent_as_it_stands(self) -> None:
        writer = ChoiceWriter(text_reply(), 0)
        assert writer.grow(snapshot("\ufffd")) == []
        [chunk] = writer.finish(snapshot("\ufffd", "length"))
        assert chunk.model_dump()["choices"][0]["text"] == "\ufffd"

    def test_logprobs_of_held_back_tokens_come_with_their_text(self) -> None:
        writer = ChoiceWriter(text_reply(logprobs=0), 0)
        first = writer.grow(snapshot("a\ufffd", tokens=("a", "\ufffd")))
        second = writer.grow(snapshot("aéb", tokens=("a", "\ufffd", "\ufffd", "b")))
        logprobs = [chunk.model_dump()["choices"][0]["logprobs"] for chunk in first + second]
        assert [one["tokens"] for one in logprobs] == [["a", "\ufffd"], ["\ufffd", "b"]]
        assert [one["text_offset"][0] for one in logprobs] == [0, 1]

    def test_an_answer_without_text_is_opened_all_the_same(self) -> None:
        [chunk] = ChoiceWriter(chat_reply(), 0).finish(snapshot("", "stop"))
        assert chunk.model_dump()["choices"][0]["delta"] == {"role": "assistant", "content": ""}


async def test_one_candidate_is_streamed_as_it_grows() -> None:
    generator = ScriptedGenerator(["so very good"], word_delay_s=0.01)
    events = await collect(run_of(generator, ScriptedScorer({"so very good": 2.0}), 1), chat_reply())
    *pieces, ending, done = events
    assert [piece["choices"][0]["delta"]["content"] for piece in pieces] == ["so", " very", " good"]
    assert all(piece["choices"][0]["finish_reason"] is None and "nbest" not in piece for piece in pieces)
    assert ending["choices"] == [{"index": 0, "finish_reason": "stop", "reward": 2.0, "delta": {}, "logprobs": None}]
    assert ending["nbest"]["completed"] == 1
    assert len({piece["id"] for piece in [*pieces, ending]}) == 1
    assert done == "[DONE]"


async def test_of_several_only_the_winners_are_sent_after_comments_on_the_progress() -> None:
    generator = ScriptedGenerator(["good", None, "bad", "best"], delays_s={1: 0.01, 2: 0.02, 3: 0.03})
    scorer = ScriptedScorer({"bad": -1.0, "good": 1.0, "best": 2.0})
    events = await collect(run_of(generator, scorer, 4), chat_reply(n=2))
    assert events[:4] == [": 1/4 candidates", ": 2/4 candidates", ": 3/4 candidates", ": 4/4 candidates"]
    choices = [event["choices"][0] for event in events[4:-1]]
    assert [(c["index"], c["delta"].get("content"), c["finish_reason"], c.get("reward")) for c in choices] == [
        (0, "best", None, None),
        (0, None, "stop", 2.0),
        (1, "good", None, None),
        (1, None, "stop", 1.0),
    ]
    assert ["nbest" in event for event in events[4:-1]] == [False, False, False, True]


CANDIDATES_STREAMED = {"stream": True, "nbest": {"stream_candidates": True}}


async def test_what_becomes_of_each_candidate_is_told_at_once_if_asked_for() -> None:
    generator = ScriptedGenerator(["so good", None, "unknown", "late"], delays_s={3: 60})
    scorer = ScriptedScorer({"so good": 1.5, "unknown": float("nan")})
    run = run_of(generator, scorer, 4, nbest={"deadline_s": 0.5})
    events = await collect(run, chat_reply(**CANDIDATES_STREAMED))
    chunks = [event for event in events if isinstance(event, dict)]
    told = [chunk for chunk in chunks if "event" in chunk.get("nbest", {})]
    finished = {"cumulative_logprob": -2.0, "finish_reason": "stop", "num_tokens": 2}
    assert sorted((chunk["nbest"] for chunk in told), key=lambda one: (one["index"], one["event"])) == [
        {"event": "finished", "index": 0, "text": "so good", **finished},
        {"event": "scored", "index": 0, "reward": 1.5},
        {"event": "failed", "index": 1, "reason": "scripted failure"},
        {"event": "finished", "index": 2, "text": "unknown", **finished, "cumulative_logprob": -1.0, "num_tokens": 1},
        {"event": "scored", "index": 2, "reward": None},
    ]
    assert all(chunk["choices"] == [] and chunk["id"] == chunks[-1]["id"] for chunk in told)
    assert chunks[: len(told)] == told  # then the winner, as without them
    account = chunks[-1]["nbest"]
    assert (account["ranking"], account["completed"], account["failed"], account["cancelled"]) == ([0, 2], 2, 1, 1)


async def test_a_single_candidate_is_told_too_and_its_growth_is_no_event() -> None:
    generator = ScriptedGenerator(["so very good"], word_delay_s=0.01)
    events = await collect(run_of(generator, ScriptedScorer(), 1), text_reply(**CANDIDATES_STREAMED))
    told = [event["nbest"]["event"] for event in events[:-1] if "event" in event.get("nbest", {})]
    assert told == ["finished", "scored"]
    assert "".join(event["choices"][0]["text"] for event in events[:-1] if event["choices"]) == "so very good"


async def test_without_being_asked_for_no_event_is_sent() -> None:
    events = await collect(run_of(ScriptedGenerator(["good", "bad"]), ScriptedScorer(), 2), chat_reply())
    assert all(event["choices"] for event in events if isinstance(event, dict))


async def test_fewer_survivors_than_choices_are_all_sent() -> None:
    events = await collect(run_of(ScriptedGenerator(["good", None]), ScriptedScorer(), 2), chat_reply(n=2))
    assert [event["choices"][0]["index"] for event in events[1:-1]] == [0, 0]
    assert events[-2]["nbest"]["failed"] == 1


async def test_usage_is_the_last_chunk_if_asked_for_and_null_before() -> None:
    reply = chat_reply(stream=True, stream_options={"include_usage": True})
    events = await collect(run_of(ScriptedGenerator(["so good"]), ScriptedScorer(), 1), reply)
    *chunks, last, done = events
    assert all(chunk["usage"] is None for chunk in chunks)
    assert (last["choices"], done) == ([], "[DONE]")
    assert last["usage"] == {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9}


async def test_silence_is_filled_with_comments() -> None:
    generator = ScriptedGenerator(["word"], delays_s={0: 0.1})
    events = await collect(run_of(generator, ScriptedScorer(), 2), chat_reply(), keep_alive_s=0.02)
    assert events.count(": keep-alive") >= 2
    assert events[-1] == "[DONE]"


async def test_completions_stream_in_their_own_shape() -> None:
    events = await collect(run_of(ScriptedGenerator(["good"]), ScriptedScorer(), 1), text_reply())
    assert [(event["object"], event["choices"][0]["text"]) for event in events[:-1]] == [
        ("text_completion", "good"),
        ("text_completion", ""),
    ]


async def test_closing_the_stream_cancels_the_run() -> None:
    generator = ScriptedGenerator(["early", "late"], delays_s={1: 60})
    run, request = run_of(generator, ScriptedScorer(), 2)
    events = stream(run, chat_reply(), request)
    assert await anext(events) == ": 1/2 candidates\n\n"
    await events.aclose()
    assert generator.cancelled == [1]


async def test_cancelling_the_reader_cancels_the_run() -> None:
    generator = ScriptedGenerator(["late"], delays_s={0: 60})
    reading = asyncio.create_task(collect(run_of(generator, ScriptedScorer(), 1), chat_reply()))
    await asyncio.sleep(0.01)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert generator.cancelled == [0]
