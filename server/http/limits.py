"""uvicorn's HTTP/1.1 protocol with limits on the size of headers and on slow clients.

    headers     at most `max_header_bytes` and `MAX_HEADERS`, or 431; complete within `client_timeout_s`, or 408
    body        limited in size and time by the app (`server.http.body`); the part that arrives after the reply is
                discarded for at most `client_timeout_s`, then the connection is closed
    reply       if the client reads nothing for `client_timeout_s`, the connection is aborted and the work cancelled

The HTTP parser has no limit on headers, and uvicorn has a timer for idle connections only. Without these limits a
client that sends one header a minute would keep its connection, and one that sends an endless header would fill the
memory. Requests refused here never reach the app; the replies have OpenAI's error envelope too.
"""

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from server.config import Settings
from server.errors import BadRequestError, ClientTimeoutError, HeadersTooLargeError, NbestError, http_status
from server.http.errors import error_reply

MAX_HEADERS = 100


class BoundedProtocol(HttpToolsProtocol):
    """One connection. The "head" is the request line and the headers."""

    max_header_bytes: int
    client_timeout_s: float

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._in_head = True
        self._heads_read = 0
        self._head_bytes = 0
        self._refusal: NbestError = BadRequestError("This is not HTTP/1.1; send a request in that form.")
        self._read_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._start_read_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_read_timer()
        self.resume_writing()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        heads_read, was_in_head = self._heads_read, self._in_head
        super().data_received(data)
        if was_in_head and heads_read == self._heads_read and not self.transport.is_closing():  # all data was head
            self._start_read_timer()
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
        self._stop_read_timer()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._in_head = True
        self._head_bytes = 0
        self._stop_read_timer()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        if not self._in_head:  # the rest of a body that the app did not read
            self._start_read_timer()
        super().on_response_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write_timer = self.loop.call_later(self.client_timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """Called by uvicorn when the parser, or one of the callbacks above, raises an error."""
        self._refuse(self._refusal)

    def _check_head(self, num_bytes: int) -> None:
        if num_bytes > self.max_header_bytes or len(self.headers) > MAX_HEADERS:
            self._refusal = self._too_large()
            raise self._refusal  # this stops the parser

    def _too_large(self) -> NbestError:
        return HeadersTooLargeError(
            f"The headers are over {self.max_header_bytes} bytes or {MAX_HEADERS} lines; send fewer or shorter ones."
        )

    def _start_read_timer(self) -> None:
        """Gives the client `client_timeout_s` from now on, unless the timer is already running."""
        if self._read_timer is None:
            self._read_timer = self.loop.call_later(self.client_timeout_s, self._on_read_timeout)

    def _stop_read_timer(self) -> None:
        if self._read_timer is not None:
            self._read_timer.cancel()
            self._read_timer = None

    def _on_read_timeout(self) -> None:
        self._read_timer = None
        if self.cycle is not None and not self.cycle.response_complete:
            return  # a request is in flight; the next head on this connection may wait
        if self._in_head and self._head_bytes:
            self._refuse(
                ClientTimeoutError(f"The headers did not arrive within {self.client_timeout_s:g} s; send them faster.")
            )
        elif not self.transport.is_closing():  # no request was sent, or it was answered
            self.transport.close()

    def _refuse(self, error: NbestError) -> None:
        if self.transport.is_closing():
            return
        body = error_reply(error).model_dump_json().encode()
        head = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body)
        self.transport.write(STATUS_LINE[http_status(error)] + head + body)
        self.transport.close()


def bounded_protocol(settings: Settings) -> type[BoundedProtocol]:
    """The protocol class with the limits of these settings, for `uvicorn.Config(http=...)`."""

    class Bounded(BoundedProtocol):
        max_header_bytes = settings.max_header_bytes
        client_timeout_s = settings.client_timeout_s

    return Bounded
