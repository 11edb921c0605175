"""A user's Python function as the scorer. SPEC `python:FILE_OR_MODULE:FUNCTION`.

    def check(prompt: str, completions: list[str]) -> list[float]: ...

`prompt` is the text of the prompt as `reranker.prompt_text` writes it: a single question, or all turns.

The function runs in a separate process, so it cannot stop the server, neither by an exception nor by crashing the
interpreter. A call that takes longer than `timeout_s` is killed, and the process is started again. What the function
prints goes to the server's stderr. The process isolates faults, not malice: it has the server's rights, so a function
that runs code from candidates needs its own sandbox.

When a call fails, its candidates are scored again one at a time, within the rest of the call's `timeout_s`. Only the
candidates at which the function fails again are left without a reward.

There is one process, so calls wait for each other. That wait does not count against `timeout_s`.
"""

import asyncio
import contextlib
import importlib.util
import json
import math
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self, cast

from reranker.candidate import Candidate, Prompt
from reranker.prompt_text import prompt_text
from reranker.scorers.base import Needs, ReadsAnyPrompt, Scores, ScoringError
from reranker.scorers.spec import FunctionSpec, ScorerSpecError

START_TIMEOUT_S = 60.0
"""Longest import of the function. Large libraries take seconds to import, and tens of seconds from a cold disk."""
MAX_ANSWER_BYTES = 1 << 20
"""Longest line from the process; the rewards of thousands of candidates take some tens of kilobytes."""


def source_exists(function: FunctionSpec) -> bool:
    """Whether the file or module exists; of a dotted module only the top-level package is checked."""
    if function.file_or_module.endswith(".py"):
        return Path(function.file_or_module).is_file()
    top = function.file_or_module.partition(".")[0]
    return Path(top).is_dir() or Path(f"{top}.py").is_file() or importlib.util.find_spec(top) is not None


class VerifierError(Exception):
    """The function returned no rewards; the message gives the reason."""


class VerifierScorer(ReadsAnyPrompt):
    """Rewards candidates with a function that runs in a separate process, for at most `timeout_s` per call."""

    needs = Needs()

    def __init__(self, name: str, function: FunctionSpec, *, timeout_s: float) -> None:
        self.name = name
        self._function = function
        self._timeout_s = timeout_s
        self._lock = asyncio.Lock()
        self._remaining_s = timeout_s  # of the call that holds the lock
        self._worker: Worker | None = None

    @classmethod
    async def create(cls, name: str, function: FunctionSpec, *, timeout_s: float) -> Self:
        """Starts the process, which imports the function.

        Raises:
            ScorerSpecError: the function does not exist or cannot be imported.
        """
        scorer = cls(name, function, timeout_s=timeout_s)
        try:
            await scorer._running_worker()
        except VerifierError as error:
            qualified_name = f"{function.name} of {function.file_or_module}"
            raise ScorerSpecError(
                f"{qualified_name} cannot be used: {error}; correct the function or its name"
            ) from error
        return scorer

    async def score(self, prompt: Prompt, candidates: Sequence[Candidate]) -> Scores:
        """Returns the function's rewards; NaN for a candidate at which it failed.

        Raises:
            ScoringError: the function failed at every candidate.
        """
        text, completions = prompt_text(prompt), [candidate.text for candidate in candidates]
        async with self._lock:
            self._remaining_s = self._timeout_s
            try:
                return Scores(tuple(await self._call(text, completions)), scored_tokens=0)
            except VerifierError as error:
                failure = error
            rewards_N = [math.nan] * len(completions)
            if len(completions) > 1:
                for index, completion in enumerate(completions):
                    with contextlib.suppress(VerifierError):
                        (rewards_N[index],) = await self._call(text, [completion])
        if all(math.isnan(reward) for reward in rewards_N):
            raise ScoringError(f"{self.name}: {failure}")
        return Scores(tuple(rewards_N), scored_tokens=0)

    async def close(self) -> None:
        await self._stop_worker()

    async def _call(self, prompt: str, completions: list[str]) -> list[float]:
        """Calls the function once, within the remaining time.

        Raises:
            VerifierError: the function failed, its process exited, or it was killed because it was too slow.
        """
        too_slow = VerifierError(f"the function took more than {self._timeout_s:g} s")
        if self._remaining_s <= 0:
            raise too_slow
        worker = await self._running_worker()
        loop = asyncio.get_running_loop()
        started_s = loop.time()
        try:
            async with asyncio.timeout(self._remaining_s):
                rewards: list[float] = (await worker.ask({"prompt": prompt, "completions": completions}))["rewards"]
                return rewards
        except TimeoutError as error:
            raise too_slow from error
        finally:
            self._remaining_s -= loop.time() - started_s
            if not worker.is_idle:  # it hangs, it exited, or the call was cancelled and the answer is not needed
                await self._stop_worker()

    async def _running_worker(self) -> "Worker":
        if self._worker is not None and self._worker.has_exited:
            await self._stop_worker()
        if self._worker is None:
            self._worker = await Worker.start(self._function)
            try:
                async with asyncio.timeout(START_TIMEOUT_S):
                    await self._worker.read()
            except TimeoutError as error:
                await self._stop_worker()
                raise VerifierError(f"importing it took more than {START_TIMEOUT_S:g} s") from error
            except BaseException:
                await self._stop_worker()
                raise
        return self._worker

    async def _stop_worker(self) -> None:
        worker, self._worker = self._worker, None
        if worker is not None:
            await worker.kill()


class Worker:
    """The process and its two pipes; `is_idle` if it has answered and waits for the next question."""

    def __init__(
        self, process: asyncio.subprocess.Process, questions: asyncio.StreamWriter, answers: asyncio.StreamReader
    ) -> None:
        self.is_idle = False
        self._process = process
        self._questions = questions
        self._answers = answers

    @classmethod
    async def start(cls, function: FunctionSpec) -> Self:
        """Starts the process; `read` returns once it has imported the function."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", f"{__package__}.verifier_worker", function.file_or_module, function.name),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=MAX_ANSWER_BYTES,
            start_new_session=True,  # the server handles Ctrl-C; and `kill` reaches its child processes
        )
        return cls(process, cast(asyncio.StreamWriter, process.stdin), cast(asyncio.StreamReader, process.stdout))

    @property
    def has_exited(self) -> bool:
        return self._process.returncode is not None

    async def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        """Sends a question and returns the answer.

        Raises:
            VerifierError: the function raised, or the process exited.
        """
        self.is_idle = False
        self._questions.write(json.dumps(question).encode() + b"\n")
        with contextlib.suppress(ConnectionError):  # the process exited; `read` reports that
            await self._questions.drain()
        return await self.read()

    async def read(self) -> dict[str, Any]:
        """Reads the next line from the process; raises as `ask` does."""
        line = await self._answers.readline()
        if not line:
            raise VerifierError(f"its process exited with code {await self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        self.is_idle = True
        if "error" in answer:
            raise VerifierError(answer["error"])
        return answer

    async def kill(self) -> None:
        """Kills the process and its child processes."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._questions.close()
        await self._process.wait()
