"""A peer as a process: made once, then asked as often as wanted, so that neither installing nor importing is measured.

The worker script reads a JSON object a line and answers with one. It never runs in this project's environment.
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
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "nbest" / "peers"
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
LONGEST_LINE = 1 << 24


class PeerError(Exception):
    """A peer that could not be installed or that failed."""


def environment(requirement: str, *, torch: bool) -> Path:
    """The Python of an environment with that requirement, made where there is none; with torch's build for CPUs.

    Raises:
        PeerError: it cannot be installed, with what pip said.
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
        except PeerError:
            _pip(python, torch_version, "--index-url", TORCH_INDEX)
    _pip(python, requirement)
    complete.touch()
    return python


def _pip(python: Path, *arguments: str) -> None:
    done = subprocess.run(
        [python, "-m", "pip", "install", "-q", *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise PeerError(f"pip install {' '.join(arguments)}: {done.stderr.strip().splitlines()[-1]}")


class Peer:
    """A worker script of this folder, running in the environment of `python`. Use it in `async with`."""

    def __init__(self, python: Path, script: str) -> None:
        self._command = (str(python), str(HERE / script))

    async def __aenter__(self) -> Self:
        clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        self._process = await asyncio.create_subprocess_exec(
            *self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=clean, limit=LONGEST_LINE
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        await self._process.wait()

    async def ask(self, **question: Any) -> Any:
        """Its answer.

        Raises:
            PeerError: it ended, or says that it failed.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(question).encode() + b"\n")
        line = await self._process.stdout.readline()
        if not line:
            raise PeerError(f"{self._command[1]} ended with {await self._process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise PeerError(answer["error"])
        return answer
