"""A baseline as a process that is started once and answers many requests, so that no installation or import is timed.

The worker script reads one JSON object a line and writes one back. It never runs in this project's environment.
"""

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from torch import __version__ as torch_version

HERE = Path(__file__).parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "nbest" / "baselines"
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
MAX_LINE_BYTES = 1 << 24


class BaselineError(Exception):
    """A baseline could not be installed, or it failed."""


def environment(requirement: str, *, torch: bool) -> Path:
    """The Python of a virtual environment with that requirement; the environment is created where it is missing.

    With `torch`, torch's build for CPUs is installed first.

    Raises:
        BaselineError: it cannot be installed; the message has pip's last line.
    """
    directory = CACHE / requirement.replace("[", "-").replace("]", "").replace("==", "-")
    python = directory / "bin" / "python"
    complete = directory / "complete"
    if complete.exists():
        return python
    subprocess.run([sys.executable, "-m", "venv", "--clear", directory], check=True)
    if torch:
        try:
            _pip(python, torch_version)
        except BaselineError:
            _pip(python, torch_version, "--index-url", TORCH_INDEX)
    _pip(python, requirement)
    complete.touch()
    return python


def _pip(python: Path, *arguments: str) -> None:
    result = subprocess.run(
        [python, "-m", "pip", "install", "-q", *arguments], capture_output=True, text=True, check=False
    )
    if result.returncode:
        raise BaselineError(f"pip install {' '.join(arguments)}: {result.stderr.strip().splitlines()[-1]}")


class BaselineProcess:
    """A worker script of this folder, run by `python`. It runs inside `async with`."""

    def __init__(self, python: Path, script: str) -> None:
        self._command = (str(python), str(HERE / script))

    async def __aenter__(self) -> Self:
        clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        self._process = await asyncio.create_subprocess_exec(
            *self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=clean, limit=MAX_LINE_BYTES
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        await self._process.wait()

    async def answer(self, **request: Any) -> Any:
        """The worker's reply to one request.

        Raises:
            BaselineError: the worker ended, or it reported an error.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        line = await self._process.stdout.readline()
        if not line:
            raise BaselineError(f"{self._command[1]} ended with {await self._process.wait()}")
        reply = json.loads(line)
        if "error" in reply:
            raise BaselineError(reply["error"])
        return reply
