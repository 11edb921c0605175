"""Streams an answer as server-sent events.

With `best_of` 1 the candidate is streamed as it grows, and `blockwise` streams each block once it is chosen. All other
requests get only the winners, once they are selected. Until then comments report the progress, or keep the connection
open while there is none; clients skip comments, as the format requires. With `stream_candidates` the stream also has an
event when a candidate has finished, failed or been scored, in chunks without choices. The last chunk of each choice has
its finish_reason and reward, and the last chunk of the last choice also has `nbest`. Then come the usage, if requested,
and `[DONE]`.

Errors are raised. Before the first event an error becomes an HTTP status; after it the caller sends `error_event` as
the last event, without `[DONE]`. Closing the generator cancels the run.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from contextlib import aclosing, suppress
from typing import Any, TypeGuard

from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from reranker.candidate import Candidate, ScoredCandidate
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
    """Queues the events of a run, in order. With `grows` they include the growing text of the only choice."""

    streams_partial = True

    def __init__(self, request: BestOfNRequest) -> None:
        self._in_blocks = request.strategy == "blockwise"
        self.grows = self._in_blocks or request.best_of == 1
        self._queue: asyncio.Queue[Event | None] = asyncio.Queue()

    def outcome(self, outcome: Outcome) -> None:
        if not self._in_blocks:  # blockwise sends no candidate of a block before the block is chosen
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
    """Turns the text of a choice into chunks, each with the text that was not sent before.

    A token may end within a character, which then appears as U+FFFD; it is sent once the character is complete.
    """

    def __init__(self, reply: Reply, index: int) -> None:
        self._reply = reply
        self._index = index
        self._sent_chars = 0
        self._sent_tokens = 0

    def grow(self, candidate: Candidate) -> list[Chunk]:
        """The new text of a candidate that is still being generated, up to its last complete character."""
        text = candidate.text.rstrip("\ufffd")
        return [self._text_chunk(candidate, text)] if len(text) > self._sent_chars else []

    def finish(self, candidate: Candidate) -> list[Chunk]:
        """The rest of the text; a choice without any text gets one empty chunk, which sends the role."""
        is_unsent = len(candidate.text) > self._sent_chars or self._sent_chars == 0
        return [self._text_chunk(candidate, candidate.text)] if is_unsent else []

    def _text_chunk(self, candidate: Candidate, text: str) -> Chunk:
        logprobs = None if candidate.logprobs is None else candidate.logprobs[self._sent_tokens :]
        chunk = self._reply.text_chunk(self._index, text[self._sent_chars :], logprobs, offset=self._sent_chars)
        self._sent_chars = len(text)
        self._sent_tokens += len(logprobs or ())
        return chunk


async def stream(
    run: Run, reply: Reply, request: BestOfNRequest, *, keep_alive_s: float = KEEP_ALIVE_S
) -> AsyncGenerator[str, None]:
    """Yields the events of one answer; closing the generator cancels the run.

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
                for chunk in _new_text(writers[0], outcomes):
                    yield _data(chunk, reply)
            elif outcomes:
                num_ended += len(outcomes)
                yield f": {num_ended}/{request.best_of} candidates\n\n"
            if reply.stream_candidates:
                for event in events:
                    if _is_reported(event):
                        yield _data(reply.event_chunk(event), reply)
        for chunk in _winner_chunks(await running, reply, writers):
            yield _data(chunk, reply)
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    yield "data: [DONE]\n\n"


def error_event(error: NbestError) -> str:
    """The last event of a stream that failed."""
    return f"data: {error_reply(error).model_dump_json()}\n\n"


def _is_reported(event: Event | None) -> TypeGuard[Event]:
    """Whether `stream_candidates` sends this event: a finish, a failure or a reward, but not growing text."""
    if isinstance(event, Candidate):
        return event.finish_reason is not None
    return event is not None


def _new_text(writer: ChoiceWriter, outcomes: list[Outcome]) -> list[Chunk]:
    """The new text of a growing candidate; every outcome holds all its text so far, so only the last is needed."""
    candidates = [outcome for outcome in outcomes if isinstance(outcome, Candidate)]
    return writer.grow(candidates[-1]) if candidates else []


def _winner_chunks(result: BestOfNResult, reply: Reply, writers: list[ChoiceWriter]) -> Iterator[Chunk]:
    choices = list(zip(writers, result.selection.ranking, strict=False))  # fewer than n where candidates failed
    for index, (writer, scored) in enumerate(choices):
        yield from writer.finish(scored.candidate)
        final = reply.final_chunk(index, scored)
        if index == len(choices) - 1:
            final.nbest = reply.account(result)
        yield final
    if reply.include_usage:
        yield reply.usage_chunk(result)


def _data(chunk: Chunk, reply: Reply) -> str:
    if reply.include_usage and chunk.usage is None:
        chunk.usage = None  # OpenAI sends null in every chunk but the last
    return f"data: {chunk.model_dump_json(exclude_unset=True)}\n\n"


class EventStream(StreamingResponse):
    """A streaming response made after the first event, so that an error before it still becomes an HTTP status."""

    def __init__(self, first: str, rest: AsyncGenerator[str, None]) -> None:
        super().__init__(
            self._body(first),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},  # the latter stops nginx from buffering
        )
        self._rest = rest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with suppress(ClientGoneError, NotReadyError):  # the client no longer reads the stream
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
            log.exception("A stream failed.")
            yield error_event(NbestError(UNEXPECTED))
