"""A function of the user's own as the scorer. SPEC `python:FILE_OR_MODULE:FUNCTION`.

    def check(prompt: str, completions: list[str]) -> list[float]: ...

`prompt` is the question where that is all there is, else the turns, as `reranker.scorers.prompt_text` writes them.

The function runs in a process of its own, so nothing it does can stop the server: not an exception, not a crash of the
interpreter, not a loop without end, which is killed after `timeout_s` and the process started anew. What it prints goes
to the server's stderr. The process isolates faults, not malice: it has the server's rights, so a function that runs
code from candidates needs a sandbox of its own.

When a call fails, its candidates are asked about again one at a time, within what is left of the call's `timeout_s`:
the one at fault is left without a reward, and the others are not.

There is one process, so calls wait for each other; that wait does not count against `timeout_s`.
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
from reranker.scorers.base import Needs, Scores, ScoringError
from reranker.scorers.prompt_text import prompt_text
from reranker.scorers.spec import FunctionSpec, ScorerSpecError

START_TIMEOUT_S = 60.0
"""Libraries for mathematics and checking code take seconds to import, on a cold disk tens of them."""
MAX_ANSWER_BYTES = 1 << 20
"""A line of answers; the rewards of thousands of candidates take some tens of kilobytes."""


def is_there(function: FunctionSpec) -> bool:
    """Whether there is a file or module to import; of a dotted module only the outermost is looked for."""
    if function.file_or_module.endswith(".py"):
        return Path(function.file_or_module).is_file()
    top = function.file_or_module.partition(".")[0]
    return Path(top).is_dir() or Path(f"{top}.py").is_file() or importlib.util.find_spec(top) is not None


class VerifierError(Exception):
    """The function gave no rewards; the message says why."""


class VerifierScorer:
    """Rewards candidates with a function that runs in a process of its own, `timeout_s` a call at most."""

    needs = Needs()

    def __init__(self, name: str, function: FunctionSpec, *, timeout_s: float) -> None:
        self.name = name
        self._function = function
        self._timeout_s = timeout_s
        self._turn = asyncio.Lock()
        self._left_s = timeout_s  # of the call whose turn it is
        self._worker: Worker | None = None

    @classmethod
    async def create(cls, name: str, function: FunctionSpec, *, timeout_s: float) -> Self:
        """Starts the process, which shows whether the function is there.

        Raises:
            ScorerSpecError: it is not, or cannot be imported.
        """
        scorer = cls(name, function, timeout_s=timeout_s)
        try:
            await scorer._running_worker()
        except VerifierError as error:
            where = f"{function.name} of {function.file_or_module}"
            raise ScorerSpecError(f"{where} cannot be used: {error}; correct the function or its name") from error
        return scorer

    async def score(self, prompt: Prompt, candidates: Sequence[Candidate]) -> Scores:
        """What the function returns; NaN for a candidate at which it failed.

        Raises:
            ScoringError: it failed at every candidate.
        """
        text, completions = prompt_text(prompt), [one.text for one in candidates]
        async with self._turn:
            self._left_s = self._timeout_s
            try:
                return Scores(tuple(await self._call(text, completions)), scored_tokens=0)
            except VerifierError as error:
                failure = error
            rewards_N = [math.nan] * len(completions)
            if len(completions) > 1:
                for place, completion in enumerate(completions):
                    with contextlib.suppress(VerifierError):
                        (rewards_N[place],) = await self._call(text, [completion])
        if all(math.isnan(reward) for reward in rewards_N):
            raise ScoringError(f"{self.name}: {failure}")
        return Scores(tuple(rewards_N), scored_tokens=0)

    async def close(self) -> None:
        await self._end()

    async def _call(self, prompt: str, completions: list[str]) -> list[float]:
        """One call, within what time is left.

        Raises:
            VerifierError: the function failed, ended its process, or was too slow and was killed.
        """
        too_slow = VerifierError(f"the function took more than {self._timeout_s:g} s")
        if self._left_s <= 0:
            raise too_slow
        worker = await self._running_worker()
        loop = asyncio.get_running_loop()
        begun_s = loop.time()
        try:
            async with asyncio.timeout(self._left_s):
                rewards: list[float] = (await worker.ask({"prompt": prompt, "completions": completions}))["rewards"]
                return rewards
        except TimeoutError as error:
            raise too_slow from error
        finally:
            self._left_s -= loop.time() - begun_s
            if not worker.is_idle:  # it hangs, has ended, or its asker was cancelled: its answer is no longer wanted
                await self._end()

    async def _running_worker(self) -> "Worker":
        if self._worker is not None and self._worker.has_ended:
            await self._end()
        if self._worker is None:
            self._worker = await Worker.start(self._function)
            try:
                async with asyncio.timeout(START_TIMEOUT_S):
                    await self._worker.read()
            except TimeoutError as error:
                await self._end()
                raise VerifierError(f"importing it took more than {START_TIMEOUT_S:g} s") from error
            except BaseException:
                await self._end()
                raise
        return self._worker

    async def _end(self) -> None:
        worker, self._worker = self._worker, None
        if worker is not None:
            await worker.kill()


class Worker:
    """The process and its two pipes. `is_idle`: it has said all it was asked for, and waits for the next question."""

    def __init__(
        self, process: asyncio.subprocess.Process, questions: asyncio.StreamWriter, answers: asyncio.StreamReader
    ) -> None:
        self.is_idle = False
        self._process = process
        self._questions = questions
        self._answers = answers

    @classmethod
    async def start(cls, function: FunctionSpec) -> Self:
        """The process; `read` returns when it has imported the function."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", f"{__package__}.verifier_worker", function.file_or_module, function.name),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=MAX_ANSWER_BYTES,
            start_new_session=True,  # Ctrl-C in the terminal is the server's to handle; and its children end with it
        )
        return cls(process, cast(asyncio.StreamWriter, process.stdin), cast(asyncio.StreamReader, process.stdout))

    @property
    def has_ended(self) -> bool:
        return self._process.returncode is not None

    async def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        """The answer to a question.

        Raises:
            VerifierError: the function raised, or the process ended.
        """
        self.is_idle = False
        self._questions.write(json.dumps(question).encode() + b"\n")
        with contextlib.suppress(ConnectionError):  # it has ended, as the missing answer will tell
            await self._questions.drain()
        return await self.read()

    async def read(self) -> dict[str, Any]:
        """What the process says next; see `ask`."""
        line = await self._answers.readline()
        if not line:
            raise VerifierError(f"its process ended with exit code {await self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        self.is_idle = True
        if "error" in answer:
            raise VerifierError(answer["error"])
        return answer

    async def kill(self) -> None:
        """Ends the process and those it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._questions.close()
        await self._process.wait()
