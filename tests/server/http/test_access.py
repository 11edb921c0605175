"""Access control: which port serves which path, and the limit of concurrent requests."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from server.config import ConfigError, load_settings
from server.http import api_keys
from tests.support.doubles import ScriptedGenerator
from tests.support.serving import HELLO, app_over, client_of, pipeline

CHAT = "/v1/chat/completions"
METRICS_PORT = 9


def metrics_port_client(client: httpx.AsyncClient) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=client._transport, base_url=f"http://nbest:{METRICS_PORT}")


async def test_with_a_metrics_port_the_main_port_serves_no_metrics() -> None:
    app = app_over(pipeline(ScriptedGenerator(["word"])), metrics_port=METRICS_PORT)
    async with client_of(app) as client:
        reply = await client.get("/metrics")
        assert (reply.status_code, reply.json()["error"]["code"]) == (404, "not_found")
        assert (await client.post(CHAT, json=HELLO)).status_code == 200
        assert "nbest_requests_total" in (await metrics_port_client(client).get("/metrics")).text


async def test_a_host_header_with_the_metrics_port_does_not_reach_the_metrics() -> None:
    """The listener is that of the connection, not the one that the client names."""
    app = app_over(pipeline(ScriptedGenerator(["word"])), metrics_port=METRICS_PORT)
    async with client_of(app) as client:
        assert (await client.get("/metrics", headers={"Host": f"nbest:{METRICS_PORT}"})).status_code == 404


async def test_the_metrics_port_serves_only_metrics_and_probes_and_needs_no_key(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    key = api_keys.new_key(file, "alice")
    app = app_over(pipeline(ScriptedGenerator(["word"])), metrics_port=METRICS_PORT, keys_file=file)
    async with client_of(app, key) as client:
        metrics_client = metrics_port_client(client)
        for path in ("/metrics", "/health", "/ready"):
            assert (await metrics_client.get(path)).status_code == 200
        for path in ("/v1/models", "/openapi.json", "/", "/metrics/"):
            assert (await metrics_client.get(path)).status_code == 404
        assert (await metrics_client.post(CHAT, json=HELLO)).status_code == 404


def test_the_metrics_port_must_differ_from_the_main_port() -> None:
    with pytest.raises(ConfigError, match="both 8000"):
        load_settings({"port": 8000, "metrics_port": 8000})


async def test_requests_over_the_concurrency_limit_are_429_before_their_body_is_read() -> None:
    generator = ScriptedGenerator(["word"], delays_s={0: 60})
    app = app_over(pipeline(generator), max_concurrent_requests=1, default_best_of=1)
    sent = 0

    async def chunks() -> AsyncIterator[bytes]:
        nonlocal sent
        sent += 1
        yield b"x"

    async with client_of(app) as client:
        first = asyncio.create_task(client.post(CHAT, json=HELLO))
        async with asyncio.timeout(30):
            while not generator.calls:  # noqa: ASYNC110  # the double has no event for its calls
                await asyncio.sleep(0)
        reply = await client.post(CHAT, content=chunks())
        assert (reply.status_code, reply.json()["error"]["code"]) == (429, "overloaded")
        assert reply.headers["Retry-After"] == "1"
        assert sent == 0
        for path in ("/health", "/ready"):
            assert (await client.get(path)).status_code == 200
        assert 'nbest_shed_total{reason="connections"} 1.0' in (await client.get("/metrics")).text
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        generator.delays_s = {}
        assert (await client.post(CHAT, json=HELLO)).status_code == 200
