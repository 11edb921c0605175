"""An answer as server-sent events.

One candidate is streamed as it grows, and an answer in blocks as they are chosen. Of several candidates otherwise only
the winners are sent, once they are chosen; until then comment lines tell the progress, and in silence keep the
connection open, which clients skip as the format demands. A request
with `stream_candidates` also hears what becomes of each candidate, in chunks without choices. Each choice
ends with a chunk that has its finish_reason and reward; the last of these also has `nbest`. Then comes the usage, if
asked for, and `[DONE]`.

Errors are raised: before the first event they can still become an HTTP status, after it the caller sends `error_event`
as the last one, and there is no `[DONE]`. Whatever ends the reading ends the run behind it.
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
from server.pipeline.best_of_n import BestOfNResult

KEEP_ALIVE_S = 5.0
"""Proxies and clients give up on a silent connection after 15 s at the earliest."""

log = logging.getLogger("nbest")

News = Outcome | ScoredCandidate
Run = Callable[[Callable[[News], None]], Coroutine[Any, Any, BestOfNResult]]
"""Starts a run that tells a listener what becomes of its candidates."""


class ChoiceWriter:
    """Turns a choice, as it grows or at once, into chunks that each bring what the last one did not.

    A tokenizer that cuts a character in two shows its first half as U+FFFD; that waits for the other half.
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
    run: Run, reply: Reply, best_of: int, *, grows: bool, keep_alive_s: float = KEEP_ALIVE_S
) -> AsyncGenerator[str, None]:
    """The events of one answer; closing the generator cancels the run.

    Of an answer that `grows` the run tells what is sure to stay, more each time.

    Raises:
        server.errors.NbestError: whatever the run raises, at whatever point of the stream it does.
    """
    heard: asyncio.Queue[News | None] = asyncio.Queue()  # None: the run has ended
    running = asyncio.create_task(run(heard.put_nowait))
    running.add_done_callback(lambda _: heard.put_nowait(None))
    writers = [ChoiceWriter(reply, index) for index in range(reply.num_choices)]
    num_ended = 0
    try:
        while not (running.done() and heard.empty()):
            arrived = await _arrivals(heard, keep_alive_s)
            outcomes = [one for one in arrived if isinstance(one, Outcome)]
            if not arrived:
                yield ": keep-alive\n\n"
            elif grows:
                for chunk in _grown(writers[0], outcomes):
                    yield _data(chunk, reply)
            elif outcomes:
                num_ended += len(outcomes)
                yield f": {num_ended}/{best_of} candidates\n\n"
            if reply.stream_candidates:
                for news in arrived:
                    if _is_event(news):
                        yield _data(reply.event_chunk(news), reply)
        for chunk in _winners(await running, reply, writers):
            yield _data(chunk, reply)
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    yield "data: [DONE]\n\n"


def error_event(error: NbestError) -> str:
    """The last event of a stream that broke off."""
    return f"data: {error_reply(error).model_dump_json()}\n\n"


async def _arrivals(heard: asyncio.Queue[News | None], patience_s: float) -> list[News | None]:
    """What has come since the last look, at least one thing, or nothing after `patience_s`."""
    try:
        async with asyncio.timeout(patience_s):
            arrived = [await heard.get()]
    except TimeoutError:
        return []
    while not heard.empty():
        arrived.append(heard.get_nowait())
    return arrived


def _is_event(news: News | None) -> TypeGuard[News]:
    """Whether a candidate's fate is new, not only its text."""
    return isinstance(news, ScoredCandidate | FailedCandidate) or (news is not None and news.finish_reason is not None)


def _grown(writer: ChoiceWriter, outcomes: list[Outcome]) -> list[Chunk]:
    """Snapshots hold everything so far, so a reader that fell behind needs only the last one."""
    snapshots = [one for one in outcomes if isinstance(one, Candidate)]
    return writer.grow(snapshots[-1]) if snapshots else []


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
    """Server-sent events whose first one is there already, so that what fails before it still had a status."""

    def __init__(self, first: str, rest: AsyncGenerator[str, None]) -> None:
        super().__init__(
            self._body(first),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},  # the latter for nginx
        )
        self._rest = rest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with suppress(ClientGoneError, NotReadyError):  # nothing more can be said, to no one or by no one
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
