"""The server-sent events of a stream: chunks, comments, candidate events, cancellation."""

import asyncio
import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest

from reranker.candidate import Candidate, FinishReason, Prompt, TokenLogprob
from server.config import Settings
from server.generation.base import SamplingParams
from server.http.response_builder import ChatReply, Reply, TextReply
from server.http.sse import ChoiceWriter, Run, stream
from server.pipeline.types import BestOfNRequest
from server.schemas.requests import ChatCompletionRequest, CompletionRequest
from tests.support.doubles import ScriptedGeneration, ScriptedGenerator, ScriptedScorer
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


class SteppedGenerator(ScriptedGenerator):
    """Candidate 0 finishes at once, and each call of `step` lets the next one finish."""

    def __init__(self, texts: Sequence[str | None]) -> None:
        super().__init__(texts)
        self.may_finish = [asyncio.Event() for _ in texts]
        self._steps = iter(self.may_finish)
        self.step()

    def step(self) -> None:
        if (event := next(self._steps, None)) is not None:
            event.set()

    def generate(
        self, prompt: Prompt, sampling: SamplingParams, n: int, *, stream_partial: bool = False
    ) -> ScriptedGeneration:
        return SteppedGeneration(self, sampling, n, stream_partial)


class SteppedGeneration(ScriptedGeneration):
    def __init__(self, generator: SteppedGenerator, sampling: SamplingParams, n: int, stream_partial: bool) -> None:
        super().__init__(generator, sampling, n, stream_partial)
        self._may_finish = generator.may_finish

    async def _write(self, index: int) -> None:
        await self._may_finish[index].wait()
        await super()._write(index)


async def collect(
    run: tuple[Run, BestOfNRequest],
    reply: Reply,
    keep_alive_s: float = 5,
    on_comment: Callable[[], None] = lambda: None,
) -> list[Any]:
    """The events: comments and [DONE] as text, chunks as dicts."""
    events: list[Any] = []
    async for event in stream(run[0], reply, run[1], keep_alive_s=keep_alive_s):
        assert event.endswith("\n\n")
        data = event.strip().removeprefix("data: ")
        events.append(json.loads(data) if data.startswith("{") else data)
        if data.startswith(":"):
            on_comment()
    return events


class TestChoiceWriter:
    def test_each_chunk_has_the_text_that_was_not_sent_before(self) -> None:
        writer = ChoiceWriter(chat_reply(), 0)
        chunks = [
            *writer.grow(snapshot("Once")),
            *writer.grow(snapshot("Once upon")),
            *writer.grow(snapshot("Once upon")),
            *writer.finish(snapshot("Once upon a", "stop")),
        ]
        deltas = [chunk.model_dump(exclude_unset=True)["choices"][0]["delta"] for chunk in chunks]
        assert deltas == [{"role": "assistant", "content": "Once"}, {"content": " upon"}, {"content": " a"}]

    def test_an_incomplete_character_is_held_back(self) -> None:
        writer = ChoiceWriter(text_reply(), 0)
        texts = ["caf\ufffd", "café", "café \ufffd\ufffd", "café 🎬"]
        chunks = [chunk for text in texts for chunk in writer.grow(snapshot(text))]
        assert [chunk.model_dump()["choices"][0]["text"] for chunk in chunks] == ["caf", "é", " ", "🎬"]

    def test_a_character_that_stays_incomplete_is_sent_at_the_end(self) -> None:
        writer = ChoiceWriter(text_reply(), 0)
        assert writer.grow(snapshot("\ufffd")) == []
        [chunk] = writer.finish(snapshot("\ufffd", "length"))
        assert chunk.model_dump()["choices"][0]["text"] == "\ufffd"

    def test_logprobs_of_held_back_tokens_are_sent_with_their_text(self) -> None:
        writer = ChoiceWriter(text_reply(logprobs=0), 0)
        first = writer.grow(snapshot("a\ufffd", tokens=("a", "\ufffd")))
        second = writer.grow(snapshot("aéb", tokens=("a", "\ufffd", "\ufffd", "b")))
        logprobs = [chunk.model_dump()["choices"][0]["logprobs"] for chunk in first + second]
        assert [chunk_logprobs["tokens"] for chunk_logprobs in logprobs] == [["a", "\ufffd"], ["\ufffd", "b"]]
        assert [chunk_logprobs["text_offset"][0] for chunk_logprobs in logprobs] == [0, 1]

    def test_an_answer_without_text_has_one_chunk_with_its_role(self) -> None:
        [chunk] = ChoiceWriter(chat_reply(), 0).finish(snapshot("", "stop"))
        assert chunk.model_dump()["choices"][0]["delta"] == {"role": "assistant", "content": ""}


async def test_a_single_candidate_is_streamed_as_it_grows() -> None:
    generator = ScriptedGenerator(["so very good"], word_delay_s=0.01)
    events = await collect(run_of(generator, ScriptedScorer({"so very good": 2.0}), 1), chat_reply())
    *chunks, final, done = events
    assert [chunk["choices"][0]["delta"]["content"] for chunk in chunks] == ["so", " very", " good"]
    assert all(chunk["choices"][0]["finish_reason"] is None and "nbest" not in chunk for chunk in chunks)
    assert final["choices"] == [{"index": 0, "finish_reason": "stop", "reward": 2.0, "delta": {}, "logprobs": None}]
    assert final["nbest"]["completed"] == 1
    assert len({chunk["id"] for chunk in [*chunks, final]}) == 1
    assert done == "[DONE]"


async def test_with_several_candidates_comments_report_the_progress_and_only_the_winners_are_sent() -> None:
    generator = SteppedGenerator(["good", None, "bad", "best"])
    scorer = ScriptedScorer({"bad": -1.0, "good": 1.0, "best": 2.0})
    events = await collect(run_of(generator, scorer, 4), chat_reply(n=2), keep_alive_s=60, on_comment=generator.step)
    assert events[:4] == [": 1/4 candidates", ": 2/4 candidates", ": 3/4 candidates", ": 4/4 candidates"]
    choices = [event["choices"][0] for event in events[4:-1]]
    assert [
        (choice["index"], choice["delta"].get("content"), choice["finish_reason"], choice.get("reward"))
        for choice in choices
    ] == [
        (0, "best", None, None),
        (0, None, "stop", 2.0),
        (1, "good", None, None),
        (1, None, "stop", 1.0),
    ]
    assert ["nbest" in event for event in events[4:-1]] == [False, False, False, True]


CANDIDATES_STREAMED = {"stream": True, "nbest": {"stream_candidates": True}}


async def test_with_stream_candidates_each_finish_failure_and_reward_is_an_event() -> None:
    generator = ScriptedGenerator(["so good", None, "unknown", "late"], delays_s={3: 60})
    scorer = ScriptedScorer({"so good": 1.5, "unknown": float("nan")})
    run = run_of(generator, scorer, 4, nbest={"deadline_s": 0.5})
    events = await collect(run, chat_reply(**CANDIDATES_STREAMED))
    chunks = [event for event in events if isinstance(event, dict)]
    event_chunks = [chunk for chunk in chunks if "event" in chunk.get("nbest", {})]
    finished = {"cumulative_logprob": -2.0, "finish_reason": "stop", "num_tokens": 2}
    assert sorted((chunk["nbest"] for chunk in event_chunks), key=lambda event: (event["index"], event["event"])) == [
        {"event": "finished", "index": 0, "text": "so good", **finished},
        {"event": "scored", "index": 0, "reward": 1.5},
        {"event": "failed", "index": 1, "reason": "scripted failure"},
        {"event": "finished", "index": 2, "text": "unknown", **finished, "cumulative_logprob": -1.0, "num_tokens": 1},
        {"event": "scored", "index": 2, "reward": None},
    ]
    assert all(chunk["choices"] == [] and chunk["id"] == chunks[-1]["id"] for chunk in event_chunks)
    assert chunks[: len(event_chunks)] == event_chunks  # the winner follows, as in a stream without them
    account = chunks[-1]["nbest"]
    assert (account["ranking"], account["completed"], account["failed"], account["cancelled"]) == ([0, 2], 2, 1, 1)


async def test_a_single_candidate_has_events_too_but_none_for_its_growth() -> None:
    generator = ScriptedGenerator(["so very good"], word_delay_s=0.01)
    events = await collect(run_of(generator, ScriptedScorer(), 1), text_reply(**CANDIDATES_STREAMED))
    kinds = [event["nbest"]["event"] for event in events[:-1] if "event" in event.get("nbest", {})]
    assert kinds == ["finished", "scored"]
    assert "".join(event["choices"][0]["text"] for event in events[:-1] if event["choices"]) == "so very good"


async def test_without_stream_candidates_no_candidate_event_is_sent() -> None:
    events = await collect(run_of(ScriptedGenerator(["good", "bad"]), ScriptedScorer(), 2), chat_reply())
    assert all(event["choices"] for event in events if isinstance(event, dict))


async def test_with_fewer_completed_candidates_than_n_all_of_them_are_sent() -> None:
    events = await collect(run_of(ScriptedGenerator(["good", None]), ScriptedScorer(), 2), chat_reply(n=2))
    assert [event["choices"][0]["index"] for event in events[1:-1]] == [0, 0]
    assert events[-2]["nbest"]["failed"] == 1


async def test_with_include_usage_the_usage_is_the_last_chunk_and_null_before() -> None:
    reply = chat_reply(stream=True, stream_options={"include_usage": True})
    events = await collect(run_of(ScriptedGenerator(["so good"]), ScriptedScorer(), 1), reply)
    *chunks, last, done = events
    assert all(chunk["usage"] is None for chunk in chunks)
    assert (last["choices"], done) == ([], "[DONE]")
    assert last["usage"] == {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9}


async def test_comments_keep_an_idle_stream_open() -> None:
    generator = ScriptedGenerator(["word"], delays_s={0: 0.1})
    events = await collect(run_of(generator, ScriptedScorer(), 2), chat_reply(), keep_alive_s=0.02)
    assert events.count(": keep-alive") >= 2
    assert events[-1] == "[DONE]"


async def test_text_completions_stream_in_their_own_format() -> None:
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
    reader = asyncio.create_task(collect(run_of(generator, ScriptedScorer(), 1), chat_reply()))
    await asyncio.sleep(0.01)
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    assert generator.cancelled == [0]
