"""An answer as server-sent events.

With `best_of` 1 the candidate is streamed as it grows; `blockwise` streams each block once it is chosen. Otherwise only
the winners are sent, once they are selected: until then comments report the progress and, in silence, keep the
connection open; clients skip comments, as the format demands. With `stream_candidates` every candidate's end and reward
is sent too, in chunks without choices. Each choice ends with a chunk that has its finish_reason and reward; the last of
these also has `nbest`. Then the usage, if requested, and `[DONE]`.

Errors are raised: before the first event they still become an HTTP status, after it the caller sends `error_event` as
the last event, and no `[DONE]`. Closing the generator cancels the run.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from contextlib import aclosing, suppress
from typing import Any, TypeGuard

from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from reranker.candidate import Candidate, FailedCandidate, ScoredCandidate
from server.errors import NbestError, NotReadyError
from server.generation.base import Outcome
from server.http.disconnect import ClientGoneError, until_disconnect
from server.http.errors import UNEXPECTED, error_reply
from server.http.response_builder import Chunk, Reply
from server.pipeline.types import BestOfNRequest, BestOfNResult, RunObserver

KEEP_ALIVE_S = 5.0
"""Proxies and clients close a silent connection after 15 s at the earliest."""

log = logging.getLogger("nbest")

Event = Outcome | ScoredCandidate
Run = Callable[[RunObserver], Coroutine[Any, Any, BestOfNResult]]
"""Starts a run with this observer."""


class EventQueue(RunObserver):
    """The events of a run, in order. `grows`: what a choice is known to hold so far is among them."""

    streams_partial = True

    def __init__(self, request: BestOfNRequest) -> None:
        self._in_blocks = request.strategy == "blockwise"
        self.grows = self._in_blocks or request.best_of == 1
        self._queue: asyncio.Queue[Event | None] = asyncio.Queue()

    def outcome(self, outcome: Outcome) -> None:
        if not self._in_blocks:  # what a block may hold is not sent before it is chosen
            self._queue.put_nowait(outcome)

    def reward(self, scored: ScoredCandidate) -> None:
        if not self._in_blocks:
            self._queue.put_nowait(scored)

    def block(self, chosen: Candidate) -> None:
        self._queue.put_nowait(chosen)

    def end(self) -> None:
        """Wakes the reader after the last event."""
        self._queue.put_nowait(None)

    @property
    def is_empty(self) -> bool:
        return self._queue.empty()

    async def next_events(self, timeout_s: float) -> list[Event | None]:
        """All events since the last call, at least one; empty after `timeout_s`. None is the end of the run."""
        try:
            async with asyncio.timeout(timeout_s):
                events = [await self._queue.get()]
        except TimeoutError:
            return []
        while not self._queue.empty():
            events.append(self._queue.get_nowait())
        return events


class ChoiceWriter:
    """Turns a choice, as it grows or at once, into chunks that each bring what the last one did not.

    A token may end within a character, which then shows as U+FFFD: that waits for the rest of the character.
    """

    def __init__(self, reply: Reply, index: int) -> None:
        self._reply = reply
        self._index = index
        self._sent_chars = 0
        self._sent_tokens = 0

    def grow(self, candidate: Candidate) -> list[Chunk]:
        """What is new and certain in a candidate that is still being written."""
        text = candidate.text.rstrip("\ufffd")
        return [self._piece(candidate, text)] if len(text) > self._sent_chars else []

    def finish(self, candidate: Candidate) -> list[Chunk]:
        """Whatever is left; a choice without any text is opened all the same."""
        left = len(candidate.text) > self._sent_chars or self._sent_chars == 0
        return [self._piece(candidate, candidate.text)] if left else []

    def _piece(self, candidate: Candidate, text: str) -> Chunk:
        logprobs = None if candidate.logprobs is None else candidate.logprobs[self._sent_tokens :]
        chunk = self._reply.piece(self._index, text[self._sent_chars :], logprobs, offset=self._sent_chars)
        self._sent_chars = len(text)
        self._sent_tokens += len(logprobs or ())
        return chunk


async def stream(
    run: Run, reply: Reply, request: BestOfNRequest, *, keep_alive_s: float = KEEP_ALIVE_S
) -> AsyncGenerator[str, None]:
    """The events of one answer; closing the generator cancels the run.

    Raises:
        server.errors.NbestError: whatever the run raises, at any point of the stream.
    """
    queue = EventQueue(request)
    running = asyncio.create_task(run(queue))
    running.add_done_callback(lambda _: queue.end())
    writers = [ChoiceWriter(reply, index) for index in range(reply.num_choices)]
    num_ended = 0
    try:
        while not (running.done() and queue.is_empty):
            events = await queue.next_events(keep_alive_s)
            outcomes = [event for event in events if isinstance(event, Outcome)]
            if not events:
                yield ": keep-alive\n\n"
            elif queue.grows:
                for chunk in _grown(writers[0], outcomes):
                    yield _data(chunk, reply)
            elif outcomes:
                num_ended += len(outcomes)
                yield f": {num_ended}/{request.best_of} candidates\n\n"
            if reply.stream_candidates:
                for event in events:
                    if _is_reported(event):
                        yield _data(reply.event_chunk(event), reply)
        for chunk in _winners(await running, reply, writers):
            yield _data(chunk, reply)
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    yield "data: [DONE]\n\n"


def error_event(error: NbestError) -> str:
    """The last event of a stream that broke off."""
    return f"data: {error_reply(error).model_dump_json()}\n\n"


def _is_reported(event: Event | None) -> TypeGuard[Event]:
    """Whether `stream_candidates` reports this event: an end or a reward, not growing text."""
    if isinstance(event, Candidate):
        return event.finish_reason is not None
    return event is not None


def _grown(writer: ChoiceWriter, outcomes: list[Outcome]) -> list[Chunk]:
    """The new text; each candidate holds everything so far, so a slow reader needs only the last."""
    candidates = [outcome for outcome in outcomes if isinstance(outcome, Candidate)]
    return writer.grow(candidates[-1]) if candidates else []


def _winners(result: BestOfNResult, reply: Reply, writers: list[ChoiceWriter]) -> Iterator[Chunk]:
    chosen = list(zip(writers, result.selection.ranking, strict=False))  # fewer where candidates failed
    for index, (writer, scored) in enumerate(chosen):
        yield from writer.finish(scored.candidate)
        ending = reply.ending(index, scored)
        if index == len(chosen) - 1:
            ending.nbest = reply.account(result)
        yield ending
    if reply.include_usage:
        yield reply.usage_chunk(result)


def _data(chunk: Chunk, reply: Reply) -> str:
    if reply.include_usage and chunk.usage is None:
        chunk.usage = None  # OpenAI sends it as null with every chunk but the last
    return f"data: {chunk.model_dump_json(exclude_unset=True)}\n\n"


class EventStream(StreamingResponse):
    """A response whose first event is known before the status line, so that an earlier error still becomes a status."""

    def __init__(self, first: str, rest: AsyncGenerator[str, None]) -> None:
        super().__init__(
            self._body(first),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},  # the latter for nginx
        )
        self._rest = rest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with suppress(ClientGoneError, NotReadyError):  # nobody reads the rest of the stream
            async with aclosing(self._rest):
                await until_disconnect(receive, self.stream_response(send))

    async def _body(self, first: str) -> AsyncGenerator[str, None]:
        yield first
        try:
            async for event in self._rest:
                yield event
        except NbestError as error:
            yield error_event(error)
        except Exception:
            log.exception("A stream broke off.")
            yield error_event(NbestError(UNEXPECTED))
