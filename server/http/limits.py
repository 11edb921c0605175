"""uvicorn's HTTP/1.1 protocol, with bounds on what a connection may cost before and after its request is the app's.

    headers     at most `max_header_bytes` and `MAX_HEADERS`, or 431; complete within `client_timeout_s`, or 408
    body        bounded and timed by the app (`server.http.body`); what comes after the answer is thrown
                away for as long
    answer      a client that takes nothing of it for `client_timeout_s` is cut off, and its work with it

The parser itself has no bound on headers and uvicorn no timer but the one for idle connections, so without this a
client that sends a header a minute keeps its connection, and one that sends an endless header fills the memory.
What is refused here never reaches the app; its replies have OpenAI's envelope all the same.
"""

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from server.config import Settings
from server.errors import BadRequestError, ClientTimeoutError, HeadersTooLargeError, NbestError, http_status
from server.http.errors import error_reply

MAX_HEADERS = 100


class BoundedProtocol(HttpToolsProtocol):
    """One connection."""

    max_header_bytes: int
    client_timeout_s: float

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._in_head = True
        self._heads_read = 0
        self._head_bytes = 0
        self._refusal: NbestError = BadRequestError("This is not HTTP/1.1; send a request in that form.")
        self._reading_ends: asyncio.TimerHandle | None = None
        self._writing_ends: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_input()

    def connection_lost(self, exc: Exception | None) -> None:
        self._expect_no_input()
        self.resume_writing()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        heads_read, was_in_head = self._heads_read, self._in_head
        super().data_received(data)
        if was_in_head and heads_read == self._heads_read and not self.transport.is_closing():  # all of it was head
            self._expect_input()
            self._head_bytes += len(data)
            if self._head_bytes > self.max_header_bytes:
                self._refuse(self._too_large())

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        self._check_head(len(self.url))

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        self._check_head(len(self.url) + sum(len(name) + len(value) for name, value in self.headers))

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._heads_read += 1
        self._expect_no_input()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._in_head = True
        self._head_bytes = 0
        self._expect_no_input()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        if not self._in_head:  # the rest of a body that nobody reads
            self._expect_input()
        super().on_response_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._writing_ends = self.loop.call_later(self.client_timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        if self._writing_ends is not None:
            self._writing_ends.cancel()
            self._writing_ends = None
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """What uvicorn calls when the parser, or one of the callbacks above, gives up."""
        self._refuse(self._refusal)

    def _check_head(self, num_bytes: int) -> None:
        if num_bytes > self.max_header_bytes or len(self.headers) > MAX_HEADERS:
            self._refusal = self._too_large()
            raise self._refusal  # which stops the parser

    def _too_large(self) -> NbestError:
        return HeadersTooLargeError(
            f"The headers are over {self.max_header_bytes} bytes or {MAX_HEADERS} lines; send fewer or shorter ones."
        )

    def _expect_input(self) -> None:
        """From now on the client has `client_timeout_s`, unless it has less already."""
        if self._reading_ends is None:
            self._reading_ends = self.loop.call_later(self.client_timeout_s, self._too_slow)

    def _expect_no_input(self) -> None:
        if self._reading_ends is not None:
            self._reading_ends.cancel()
            self._reading_ends = None

    def _too_slow(self) -> None:
        self._reading_ends = None
        if self.cycle is not None and not self.cycle.response_complete:
            return  # it has a request under way, and what it began to send behind that can wait
        if self._in_head and self._head_bytes:
            self._refuse(
                ClientTimeoutError(f"The headers did not arrive within {self.client_timeout_s:g} s; send them faster.")
            )
        elif not self.transport.is_closing():  # nothing was asked, or it was answered
            self.transport.close()

    def _refuse(self, error: NbestError) -> None:
        if self.transport.is_closing():
            return
        body = error_reply(error).model_dump_json().encode()
        head = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body)
        self.transport.write(STATUS_LINE[http_status(error)] + head + body)
        self.transport.close()


def bounded_by(settings: Settings) -> type[BoundedProtocol]:
    """The protocol with these settings, for `uvicorn.Config(http=...)`."""

    class Bounded(BoundedProtocol):
        max_header_bytes = settings.max_header_bytes
        client_timeout_s = settings.client_timeout_s

    return Bounded
