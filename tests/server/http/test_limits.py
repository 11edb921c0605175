"""Limits on headers and slow clients, over a real socket, byte by byte."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import uvicorn
from uvicorn.server import ServerState

from server.config import Settings
from server.http.limits import MAX_HEADERS, BoundedProtocol, bounded_protocol
from server.observability.metrics import Metrics
from tests.support.doubles import ScriptedGenerator
from tests.support.serving import HELLO, address_of, app_over, pipeline

CLIENT_TIMEOUT_S = 0.2
TEST_TIMEOUT_S = 30
"""How long a test waits for an event before it fails."""
BODY = json.dumps(HELLO).encode()
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: nbest\r\nContent-Length: %d\r\n\r\n" % len(BODY)


class Connection:
    """A client that sends raw bytes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def reply(self) -> tuple[int, dict[str, str], bytes]:
        """The next reply: status, headers, body."""
        async with asyncio.timeout(TEST_TIMEOUT_S):
            lines = (await self.reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
            headers = dict(line.lower().split(": ", 1) for line in lines[1:] if line)
            return int(lines[0].split()[1]), headers, await self.reader.readexactly(int(headers["content-length"]))

    async def refusal(self) -> tuple[int, str]:
        """The status and error code of a refusal, after which the connection must be closed."""
        status, headers, body = await self.reply()
        assert headers["connection"] == "close"
        error = json.loads(body)["error"]
        assert set(error) == {"message", "type", "param", "code"}
        await self.closed()
        return status, error["code"]

    async def closed(self) -> None:
        async with asyncio.timeout(TEST_TIMEOUT_S):
            assert await self.reader.read() == b""


@asynccontextmanager
async def connected(**settings: Any) -> AsyncIterator[Connection]:
    app = app_over(pipeline(ScriptedGenerator(["word"])), default_best_of=1, **settings)
    async with address_of(app, **settings) as address:
        reader, writer = await asyncio.open_connection(*address.removeprefix("http://").split(":"))
        try:
            yield Connection(reader, writer)
        finally:
            writer.transport.abort()


@pytest.mark.parametrize(
    "head",
    [
        b"GET /health HTTP/1.1\r\nHost: nbest\r\n",
        b"GET /hea",
        b"\r\n",
    ],
)
async def test_a_head_that_does_not_end_is_408(head: bytes) -> None:
    async with connected(client_timeout_s=CLIENT_TIMEOUT_S) as client:
        await client.send(head)
        assert await client.refusal() == (408, "request_timeout")


async def test_the_timeout_of_the_head_is_for_the_whole_head_not_between_two_bytes() -> None:
    async with connected(client_timeout_s=CLIENT_TIMEOUT_S) as client:
        await client.send(b"GET /health HTTP/1.1\r\n")

        async def trickle() -> None:
            for number in range(10_000):
                await client.send(b"X-%d: y\r\n" % number)
                await asyncio.sleep(CLIENT_TIMEOUT_S / 10)

        trickling = asyncio.create_task(trickle())
        assert (await client.reply())[0] == 408
        trickling.cancel()
        await asyncio.gather(trickling, return_exceptions=True)


async def test_a_connection_without_a_request_is_closed() -> None:
    async with connected(client_timeout_s=CLIENT_TIMEOUT_S) as client:
        await client.closed()


async def test_a_body_that_does_not_end_is_408_and_the_connection_is_closed() -> None:
    async with connected(client_timeout_s=CLIENT_TIMEOUT_S) as client:
        await client.send(HEAD + BODY[:-1])
        assert await client.refusal() == (408, "request_timeout")


async def test_a_client_that_disconnects_during_its_body_is_counted_and_logs_no_error(
    caplog: pytest.LogCaptureFixture,
) -> None:
    metrics = Metrics()
    gone = {"endpoint": "/v1/chat/completions", "status": "499"}
    async with address_of(app_over(pipeline(ScriptedGenerator(["word"])), metrics)) as address:
        _, writer = await asyncio.open_connection(*address.removeprefix("http://").split(":"))
        writer.write(HEAD + BODY[:-1])
        await writer.drain()
        writer.close()
        async with asyncio.timeout(TEST_TIMEOUT_S):
            while not metrics.registry.get_sample_value("nbest_requests_total", gone):  # noqa: ASYNC110
                await asyncio.sleep(0.01)  # the counter has no event for its changes
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


async def test_a_body_that_continues_after_the_reply_is_not_read_forever() -> None:
    async with connected(client_timeout_s=CLIENT_TIMEOUT_S, max_body_bytes=10) as client:
        await client.send(HEAD + b"x")
        assert (await client.reply())[0] == 413
        await client.closed()


async def test_the_client_timeout_does_not_limit_the_time_of_an_answer() -> None:
    app = app_over(
        pipeline(ScriptedGenerator(["word"], delays_s={0: 3 * CLIENT_TIMEOUT_S})),
        default_best_of=1,
        client_timeout_s=CLIENT_TIMEOUT_S,
    )
    async with address_of(app, client_timeout_s=CLIENT_TIMEOUT_S) as address:
        reader, writer = await asyncio.open_connection(*address.removeprefix("http://").split(":"))
        client = Connection(reader, writer)
        await client.send(HEAD + BODY)
        assert (await client.reply())[0] == 200
        await client.send(HEAD + BODY)  # the connection stays usable
        assert (await client.reply())[0] == 200
        writer.close()


class Transport(asyncio.Transport):
    """A transport that records that it was aborted."""

    def __init__(self) -> None:
        super().__init__()
        self.aborted = asyncio.Event()

    def is_closing(self) -> bool:
        return self.aborted.is_set()

    def close(self) -> None:
        """Does nothing: the read timer closes the transport too, and these tests are about the write timer."""

    def abort(self) -> None:
        self.aborted.set()


def open_connection(client_timeout_s: float) -> tuple[BoundedProtocol, Transport]:
    settings, transport = Settings(client_timeout_s=client_timeout_s), Transport()
    config = uvicorn.Config(app_over(pipeline(ScriptedGenerator(["word"]))), log_config=None)
    protocol = bounded_protocol(settings)(config=config, server_state=ServerState(), app_state={})
    protocol.connection_made(transport)
    return protocol, transport


async def test_a_connection_whose_client_reads_nothing_is_aborted() -> None:
    protocol, transport = open_connection(client_timeout_s=0.01)
    protocol.pause_writing()
    async with asyncio.timeout(TEST_TIMEOUT_S):
        await transport.aborted.wait()


async def test_a_connection_whose_client_reads_slowly_is_not_aborted() -> None:
    protocol, transport = open_connection(client_timeout_s=0.01)
    for _ in range(5):
        protocol.pause_writing()
        protocol.resume_writing()
    await asyncio.sleep(0.05)
    assert not transport.aborted.is_set()
    protocol.connection_lost(ConnectionResetError())


@pytest.mark.parametrize(
    "head",
    [
        b"GET /health HTTP/1.1\r\nX: " + b"y" * 3000,  # the value has not ended
        b"GET /health HTTP/1.1\r\nX: " + b"y" * 3000 + b"\r\n\r\n",
        b"GET /" + b"y" * 3000 + b" HTTP/1.1\r\n\r\n",
        b"GET /" + b"y" * 3000,
        b"GET /health HTTP/1.1\r\n" + b"X: y\r\n" * (MAX_HEADERS + 1) + b"\r\n",
        b"\r\n" * 3000,
    ],
    ids=["endless value", "long value", "long path", "endless path", "many headers", "only line ends"],
)
async def test_headers_over_the_limit_are_431(head: bytes) -> None:
    async with connected(max_header_bytes=2000) as client:
        await client.send(head)
        assert await client.refusal() == (431, "headers_too_large")


async def test_headers_within_the_limit_are_accepted_with_a_body_over_it() -> None:
    async with connected(max_header_bytes=2000) as client:
        body = BODY[:-1] + b" " * 100_000 + b"}"
        head = b"POST /v1/chat/completions HTTP/1.1\r\nX: " + b"y" * 1800 + b"\r\nContent-Length: %d\r\n\r\n"
        for _ in range(2):  # each request has the whole limit
            await client.send(head % len(body) + body)
            assert (await client.reply())[0] == 200


async def test_bytes_that_are_not_http_are_400_in_the_envelope() -> None:
    async with connected() as client:
        await client.send(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 hello over TLS\r\n\r\n")
        status, headers, body = await client.reply()
        assert (status, headers["connection"]) == (400, "close")
        assert json.loads(body)["error"]["type"] == "invalid_request_error"
